"""The public functions that take tokens to their experts' rows and back: checks and dispatch.

Legend: T tokens, D model width, K experts a token, R rows; N rows to take from, M rows taken.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.moe.permute.checks import (
    check_permute,
    check_permute_grad,
    check_take_rows,
    check_unpermute,
    check_unpermute_grads,
)
from mmkernels.moe.permute.eager import (
    eager_permute,
    eager_permute_grad,
    eager_take_rows,
    eager_unpermute,
    eager_unpermute_grads,
)
from mmkernels.moe.route_types import Route


def permute(
    x_TD: Tensor, route: Route, *, clear: bool = True, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Copy each token to the rows of its kept assignments, sorted by expert. Differentiable in x.

    Args:
        x_TD: tokens [T, D], bfloat16, float16 or float32 (float64 too without the kernels).
        route: result of :func:`mmkernels.moe.route` for these tokens.
        clear: zero the unused rows, which then must be the last ones. Without, they may lie anywhere and hold anything.
        out: where to, contiguous [R, D] in the dtype of x; the result then has no gradient (:func:`permute_grad`).
        backend: "auto" (the kernels on CUDA, else torch), "triton" or "naive".

    Returns:
        Rows [R, D] in the dtype of x; no gradient is read from unused ones.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_permute(x_TD, route, out)
    if not use_triton(backend, "x_TD", x_TD, others=("naive",)):
        return eager_permute(x_TD, route, out)
    from mmkernels.moe.permute.launch import triton_permute

    return triton_permute(x_TD, route, clear, out)


def permute_grad(dy_RD: Tensor, route: Route, *, backend: str = "auto") -> Tensor:
    """The gradient of :func:`permute`, the sum of each token's rows, for a caller with a backward pass of its own.

    Args:
        dy_RD: gradient of the result of :func:`permute`. Unused rows are never read.
        route: as in forward.
        backend: as for :func:`permute`.

    Returns:
        [T, D] in the dtype of dy.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_permute_grad(dy_RD, route)
    if not use_triton(backend, "dy_RD", dy_RD, others=("naive",)):
        return eager_permute_grad(dy_RD, route)
    from mmkernels.moe.permute.launch import triton_permute_grad

    return triton_permute_grad(dy_RD, route)


def unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route, *, clear: bool = True, backend: str = "auto") -> Tensor:
    """Weighted sum of each token's kept rows, in fp32. Differentiable in y and in the weights.

    Args:
        y_RD: rows [R, D], dtypes as for :func:`permute`. Unused rows are never read.
        weight_TK: float32 [T, K], as a rule ``route.weight_TK``.
        route: result of :func:`mmkernels.moe.route`.
        clear: give the unused rows, which then must be the last ones, gradient 0. Without, it may be anything.
        backend: as for :func:`permute`.

    Returns:
        [T, D] in the dtype of y. Dropped assignments add nothing and their weights get gradient 0.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_unpermute(y_RD, weight_TK, route)
    if not use_triton(backend, "y_RD", y_RD, others=("naive",)):
        return eager_unpermute(y_RD, weight_TK, route)
    from mmkernels.moe.permute.launch import triton_unpermute

    return triton_unpermute(y_RD, weight_TK, route, clear)


def unpermute_grads(
    do_TD: Tensor,
    y_RD: Tensor,
    weight_TK: Tensor,
    route: Route,
    *,
    clear: bool = True,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`unpermute`, for a caller with a backward pass of its own.

    Args:
        do_TD: gradient of the result of :func:`unpermute`, in the dtype of y.
        y_RD: as in forward, like the arguments that are not named here.
        out: where y's gradient goes, contiguous [R, D] in the dtype of y; fresh memory if not given.

    Returns:
        Gradients of y [R, D], in its dtype, and of the weights [T, K], in theirs.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_unpermute_grads(do_TD, y_RD, weight_TK, route, out)
    if not use_triton(backend, "y_RD", y_RD, others=("naive",)):
        return eager_unpermute_grads(do_TD, y_RD, weight_TK, route, out)
    from mmkernels.moe.permute.launch import triton_unpermute_grads

    return triton_unpermute_grads(do_TD, y_RD, weight_TK, route, clear, out)


def take_rows(
    x_ND: Tensor, index_M: Tensor, *, clear: bool = True, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Row `index` of x for each index. Not differentiable.

    Args:
        x_ND: rows [N, D], dtypes as for :func:`permute`.
        index_M: int32 [M], -1 to N - 1.
        clear: zero the rows where the index is -1. Without, they may hold anything.
        out: where to, contiguous [M, D] in the dtype of x; fresh memory if not given.
        backend: as for :func:`permute`.

    Returns:
        [M, D] in the dtype of x.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_take_rows(x_ND, index_M, out)
    if not use_triton(backend, "x_ND", x_ND, others=("naive",)):
        return eager_take_rows(x_ND, index_M, out)
    from mmkernels.moe.permute.launch import triton_take_rows

    return triton_take_rows(x_ND, index_M, clear, out)
