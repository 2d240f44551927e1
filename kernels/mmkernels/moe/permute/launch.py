"""Permute and unpermute through the Triton kernels: one launch each, forward and backward (all tunables are here).

Legend: T tokens, D model width, K experts a token, R rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.common.launch_shapes import dividing_block
from mmkernels.moe.permute.kernels import permute_kernel, unpermute_gather_kernel, unpermute_grad_kernel
from mmkernels.moe.route_types import Route

ROW_BLOCK = 2048
"""Elements of a row one program moves, where no sum over the row is needed."""
ELEMENTS_PER_THREAD = 16
"""Of a row's block: two loads of 16 bytes a thread in 16-bit dtypes."""
REDUCE_ELEMENTS_PER_THREAD = 32
"""Elements a thread of the one kernel whose programs sum over rows, of all K assignments together."""
REDUCE_TILE = 4096
"""Elements of its K rows such a program holds at a time."""
MAX_WARPS = 16


def triton_permute(x_TD: Tensor, route: Route, clear: bool, out: Tensor | None = None) -> Tensor:
    """Rows [R, D]: the backend "triton" of `permute`, which has checked the arguments."""
    if out is not None:
        return _permute(x_TD.detach(), route.row_TK, route.offset_E, out, clear)
    return _Permute.apply(x_TD, route.row_TK, route.offset_E, route.token_R.shape[0], clear)


def triton_permute_grad(dy_RD: Tensor, route: Route) -> Tensor:
    """Sum of each token's rows, [T, D]: the backend "triton" of `permute_grad`, which has checked the arguments."""
    return _gather(dy_RD.contiguous(), None, route.row_TK)


def triton_unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route, clear: bool) -> Tensor:
    """Weighted sums [T, D]: the backend "triton" of `unpermute`, which has checked the arguments."""
    return _Unpermute.apply(y_RD, weight_TK, route.row_TK, route.offset_E, clear)


def triton_unpermute_grads(
    do_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, route: Route, clear: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights: the backend "triton" of `unpermute_grads`, which has checked the arguments."""
    y_RD, weight_TK = y_RD.contiguous(), weight_TK.contiguous()
    dy_RD = torch.empty_like(y_RD) if out is None else out
    return _unpermute_grads(do_TD.contiguous(), y_RD, weight_TK, dy_RD, route.row_TK, route.offset_E, clear)


def triton_take_rows(x_ND: Tensor, index_M: Tensor, clear: bool, out: Tensor | None = None) -> Tensor:
    """Rows by index, [M, D]: the backend "triton" of `take_rows`, which has checked the arguments."""
    return _gather(x_ND.contiguous(), None, index_M[:, None], skip=not clear, out_TD=out)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, row_TK: Tensor, offset_E: Tensor, rows: int, clear: bool) -> Tensor:
        ctx.save_for_backward(row_TK)
        y_RD = torch.empty(rows, x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device)
        return _permute(x_TD, row_TK, offset_E, y_RD, clear)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_RD: Tensor) -> tuple[Tensor, None, None, None, None]:
        (row_TK,) = ctx.saved_tensors
        return _gather(dy_RD.contiguous(), None, row_TK), None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor, offset_E: Tensor, clear: bool
    ) -> Tensor:
        y_RD, weight_TK, ctx.clear = y_RD.contiguous(), weight_TK.contiguous(), clear
        ctx.save_for_backward(y_RD, weight_TK, row_TK, offset_E)
        return _gather(y_RD, weight_TK, row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_RD, weight_TK, row_TK, offset_E = ctx.saved_tensors
        grads = _unpermute_grads(
            do_TD.contiguous(), y_RD, weight_TK, torch.empty_like(y_RD), row_TK, offset_E, ctx.clear
        )
        return *grads, None, None, None


def _permute(x_TD: Tensor, row_TK: Tensor, offset_E: Tensor, y_RD: Tensor, clear: bool) -> Tensor:
    """Copy tokens to their rows of y, which is returned."""
    x_TD, (tokens, width), block = x_TD.contiguous(), x_TD.shape, dividing_block(x_TD.shape[1], ROW_BLOCK)
    if y_RD.numel():
        permute_kernel[(tokens * triton.cdiv(width, block),)](
            x_TD, y_RD, row_TK, offset_E, tokens, y_RD.shape[0],
            E=offset_E.shape[0], K=row_TK.shape[1], D=width, BLOCK_D=block, CLEAR=clear, num_warps=warps(block),
        )  # fmt: skip
    return y_RD


def _unpermute_grads(
    do_TD: Tensor,
    y_RD: Tensor,
    weight_TK: Tensor,
    dy_RD: Tensor,
    row_TK: Tensor,
    offset_E: Tensor,
    clear: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows, into `dy`, and of weights."""
    (tokens, width), dweight_TK = do_TD.shape, torch.empty_like(weight_TK)
    padded = triton.next_power_of_2(row_TK.shape[1])
    block = reduce_block(width, padded)
    if tokens:
        unpermute_grad_kernel[(tokens,)](
            do_TD, y_RD, weight_TK, dy_RD, dweight_TK, row_TK, offset_E, tokens, y_RD.shape[0],
            E=offset_E.shape[0], K=row_TK.shape[1], D=width, KP=padded, BLOCK_D=block, CLEAR=clear,
            num_warps=warps(padded * block, REDUCE_ELEMENTS_PER_THREAD),
        )  # fmt: skip
    return dy_RD, dweight_TK


def _gather(
    y_RD: Tensor, weight_TK: Tensor | None, row_TK: Tensor, skip: bool = False, out_TD: Tensor | None = None
) -> Tensor:
    """(Weighted) sum of each token's rows; `skip` leaves a token unwritten whose last assignment has no row."""
    (tokens, top_k), width = row_TK.shape, y_RD.shape[1]
    if out_TD is None:
        out_TD = torch.empty(tokens, width, dtype=y_RD.dtype, device=y_RD.device)
    block = dividing_block(width, ROW_BLOCK)
    if out_TD.numel():
        unpermute_gather_kernel[(tokens * triton.cdiv(width, block),)](
            y_RD, weight_TK, out_TD, row_TK, y_RD.shape[0],
            K=top_k, D=width, BLOCK_D=block, WEIGHTED=weight_TK is not None, SKIP=skip, num_warps=warps(block),
        )  # fmt: skip
    return out_TD


def reduce_block(width: int, padded_top_k: int) -> int:
    """Block of each of K rows of this width, K rounded up to a power of two."""
    return max(16, min(dividing_block(width, ROW_BLOCK), REDUCE_TILE // padded_top_k))


def warps(elements: int, elements_per_thread: int = ELEMENTS_PER_THREAD) -> int:
    """Warps for a program that holds this many elements."""
    return max(1, min(MAX_WARPS, elements // (32 * elements_per_thread)))
