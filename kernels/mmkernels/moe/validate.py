"""Argument checks of the public functions. They read no values from a device.

Legend: T tokens, D model width, E experts, K experts a token, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES
from mmkernels.common.errors import KernelArgumentError
from mmkernels.moe.layout import Quotas, Route

DROP_POLICIES = ("probs", "position")
MAX_EXPERTS = 1024
"""One program of the routing kernels holds all logits of a token."""
MAX_ASSIGNMENTS = 2**30
"""Assignments and rows are numbered in int32, with room for sums of two."""


def check_route(
    logits_TE: Tensor, top_k: int, capacity: int | None, drop_policy: str, quotas: Quotas | None = None
) -> None:
    """Refuse arguments that `route` cannot take.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    _check_matrix("logits_TE", logits_TE, "[T, E]", (torch.float32,))
    tokens, experts = logits_TE.shape
    if not 1 <= experts <= MAX_EXPERTS:
        raise KernelArgumentError("logits_TE", f"{experts} experts", f"1 to {MAX_EXPERTS}")
    _check_int("top_k", top_k, 1)
    if top_k > experts:
        raise KernelArgumentError("top_k", top_k, f"at most the number of experts, {experts}")
    if tokens * top_k >= MAX_ASSIGNMENTS:
        raise KernelArgumentError("logits_TE", f"{tokens} tokens * top_k {top_k}", "fewer than 2^30 assignments")
    if capacity is not None:
        _check_int("capacity", capacity, 1)
        if quotas is not None:
            raise KernelArgumentError("quotas", "a function", f"None with capacity {capacity}: give one of them")
    if drop_policy not in DROP_POLICIES:
        raise KernelArgumentError("drop_policy", repr(drop_policy), ", ".join(DROP_POLICIES))


def check_permute(x_TD: Tensor, route: Route, out: Tensor | None = None) -> None:
    """Refuse tokens that the route is not about, or memory of another kind; errors as above."""
    _check_matrix("x_TD", x_TD, "[T, D]", ALL_DTYPES)
    _check_rows("x_TD", x_TD, route.slot_TK.shape[0], "tokens", route)
    _check_out(out, route.token_R.shape[0], x_TD)


def check_unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route) -> None:
    """Refuse rows or weights that the route is not about; errors as above."""
    _check_matrix("y_RD", y_RD, "[R, D]", ALL_DTYPES)
    _check_rows("y_RD", y_RD, route.token_R.shape[0], "rows", route)
    allowed = (torch.float32, torch.float64) if y_RD.dtype == torch.float64 else (torch.float32,)
    _check_matrix("weight_TK", weight_TK, "[T, K]", allowed)
    if weight_TK.shape != route.slot_TK.shape:
        want = f"one weight an assignment, {list(route.slot_TK.shape)}"
        raise KernelArgumentError("weight_TK", f"shape {list(weight_TK.shape)}", want)
    if weight_TK.device != y_RD.device:
        raise KernelArgumentError("weight_TK", f"device {weight_TK.device}", f"the device of y_RD, {y_RD.device}")


def check_unpermute_grads(
    do_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, route: Route, out: Tensor | None = None
) -> None:
    """Refuse what `unpermute` would, gradients of another kind than its result, and such memory; errors as above."""
    check_unpermute(y_RD, weight_TK, route)
    _check_matrix("do_TD", do_TD, "[T, D]", (y_RD.dtype,))
    _check_rows("do_TD", do_TD, route.slot_TK.shape[0], "tokens", route)
    if do_TD.shape[1] != y_RD.shape[1]:
        raise KernelArgumentError("do_TD", f"shape {list(do_TD.shape)}", f"{y_RD.shape[1]} columns, as in y_RD")
    _check_out(out, y_RD.shape[0], y_RD)


def check_permute_grad(dy_RD: Tensor, route: Route) -> None:
    """Refuse gradients of rows that the route is not about; errors as above."""
    _check_matrix("dy_RD", dy_RD, "[R, D]", ALL_DTYPES)
    _check_rows("dy_RD", dy_RD, route.token_R.shape[0], "rows", route)


def check_take_rows(x_ND: Tensor, index_M: Tensor, out: Tensor | None = None) -> None:
    """Refuse rows, indices or memory of another kind; errors as above."""
    _check_matrix("x_ND", x_ND, "[N, D]", ALL_DTYPES)
    if not isinstance(index_M, Tensor) or index_M.dtype != torch.int32 or index_M.ndim != 1:
        got = f"{index_M.dtype} {list(index_M.shape)}" if isinstance(index_M, Tensor) else type(index_M).__name__
        raise KernelArgumentError("index_M", got, "an int32 tensor [M]")
    if index_M.device != x_ND.device:
        raise KernelArgumentError("index_M", f"device {index_M.device}", f"the device of x_ND, {x_ND.device}")
    _check_out(out, index_M.shape[0], x_ND)


def _check_matrix(name: str, x: object, layout: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise KernelArgumentError(name, type(x).__name__, f"a tensor {layout}")
    if x.ndim != 2:
        raise KernelArgumentError(name, f"shape {list(x.shape)}", f"2 dimensions {layout}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelArgumentError(name, f"dtype {x.dtype}", names)


def _check_out(out: Tensor | None, rows: int, like: Tensor) -> None:
    """Refuse memory that is not for so many rows like these."""
    if out is None:
        return
    want = (rows, like.shape[1])
    if (out.shape, out.dtype, out.device) != (want, like.dtype, like.device) or not out.is_contiguous():
        got = f"{out.dtype} {list(out.shape)} on {out.device}, strides {list(out.stride())}"
        raise KernelArgumentError("out", got, f"contiguous {like.dtype} {list(want)} on {like.device}")


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise KernelArgumentError(name, f"{value!r} of type {type(value).__name__}", "an int")
    if value < least:
        raise KernelArgumentError(name, value, f"at least {least}")


def _check_rows(name: str, x: Tensor, rows: int, what: str, route: Route) -> None:
    if x.shape[0] != rows:
        raise KernelArgumentError(name, f"shape {list(x.shape)}", f"[{rows}, D]: the {what} of the route")
    if x.device != route.slot_TK.device:
        raise KernelArgumentError(name, f"device {x.device}", f"the device of the route, {route.slot_TK.device}")
