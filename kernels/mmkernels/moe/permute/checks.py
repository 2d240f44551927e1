"""Argument checks of permute, unpermute and their gradients. They read no values from a device.

Legend: T tokens, D model width, K experts a token, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_matrix
from mmkernels.common.errors import KernelArgumentError
from mmkernels.moe.route_types import Route


def check_permute(x_TD: Tensor, route: Route, out: Tensor | None = None) -> None:
    """Refuse tokens that the route is not about, or memory of another kind.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_matrix("x_TD", x_TD, "[T, D]", ALL_DTYPES)
    _check_rows("x_TD", x_TD, route.row_TK.shape[0], "tokens", route)
    _check_out(out, route.token_R.shape[0], x_TD)


def check_unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route) -> None:
    """Refuse rows or weights that the route is not about; errors as above."""
    check_matrix("y_RD", y_RD, "[R, D]", ALL_DTYPES)
    _check_rows("y_RD", y_RD, route.token_R.shape[0], "rows", route)
    allowed = (torch.float32, torch.float64) if y_RD.dtype == torch.float64 else (torch.float32,)
    check_matrix("weight_TK", weight_TK, "[T, K]", allowed)
    if weight_TK.shape != route.row_TK.shape:
        want = f"one weight an assignment, {list(route.row_TK.shape)}"
        raise KernelArgumentError("weight_TK", f"shape {list(weight_TK.shape)}", want)
    if weight_TK.device != y_RD.device:
        raise KernelArgumentError("weight_TK", f"device {weight_TK.device}", f"the device of y_RD, {y_RD.device}")


def check_unpermute_grads(
    do_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, route: Route, out: Tensor | None = None
) -> None:
    """Refuse arguments that `unpermute` would, a gradient unlike its result, or wrong memory; errors as above."""
    check_unpermute(y_RD, weight_TK, route)
    check_matrix("do_TD", do_TD, "[T, D]", (y_RD.dtype,))
    _check_rows("do_TD", do_TD, route.row_TK.shape[0], "tokens", route)
    if do_TD.shape[1] != y_RD.shape[1]:
        raise KernelArgumentError("do_TD", f"shape {list(do_TD.shape)}", f"{y_RD.shape[1]} columns, as in y_RD")
    _check_out(out, y_RD.shape[0], y_RD)


def check_permute_grad(dy_RD: Tensor, route: Route) -> None:
    """Refuse gradients of rows that the route is not about; errors as above."""
    check_matrix("dy_RD", dy_RD, "[R, D]", ALL_DTYPES)
    _check_rows("dy_RD", dy_RD, route.token_R.shape[0], "rows", route)


def check_take_rows(x_ND: Tensor, index_M: Tensor, out: Tensor | None = None) -> None:
    """Refuse rows, indices or memory of another kind; errors as above."""
    check_matrix("x_ND", x_ND, "[N, D]", ALL_DTYPES)
    if not isinstance(index_M, Tensor) or index_M.dtype != torch.int32 or index_M.ndim != 1:
        got = f"{index_M.dtype} {list(index_M.shape)}" if isinstance(index_M, Tensor) else type(index_M).__name__
        raise KernelArgumentError("index_M", got, "an int32 tensor [M]")
    if index_M.device != x_ND.device:
        raise KernelArgumentError("index_M", f"device {index_M.device}", f"the device of x_ND, {x_ND.device}")
    _check_out(out, index_M.shape[0], x_ND)


def _check_out(out: Tensor | None, rows: int, like: Tensor) -> None:
    """Refuse memory that is not for so many rows of the width, dtype and device of `like`."""
    if out is None:
        return
    want = (rows, like.shape[1])
    if (out.shape, out.dtype, out.device) != (want, like.dtype, like.device) or not out.is_contiguous():
        got = f"{out.dtype} {list(out.shape)} on {out.device}, strides {list(out.stride())}"
        raise KernelArgumentError("out", got, f"contiguous {like.dtype} {list(want)} on {like.device}")


def _check_rows(name: str, x: Tensor, rows: int, what: str, route: Route) -> None:
    if x.shape[0] != rows:
        raise KernelArgumentError(name, f"shape {list(x.shape)}", f"[{rows}, D]: the {what} of the route")
    if x.device != route.row_TK.device:
        raise KernelArgumentError(name, f"device {x.device}", f"the device of the route, {route.row_TK.device}")
