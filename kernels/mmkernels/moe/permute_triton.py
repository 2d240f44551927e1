"""Permute and unpermute on Triton: one launch each, forward and backward.

Legend: T tokens, D model width, K experts a token, R rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.moe import tuning
from mmkernels.moe.layout import Route
from mmkernels.moe.permute_kernels import gather_kernel, permute_kernel, unpermute_grad_kernel


def triton_permute(x_TD: Tensor, route: Route, clear: bool, out: Tensor | None = None) -> Tensor:
    """See `mmkernels.moe.permute`, which has checked the arguments."""
    if out is not None:
        return _permute(x_TD.detach(), route.slot_TK, route.offset_E, out, clear)
    return _Permute.apply(x_TD, route.slot_TK, route.offset_E, route.token_R.shape[0], clear)


def triton_permute_grad(dy_RD: Tensor, route: Route) -> Tensor:
    """See `mmkernels.moe.permute_grad`, which has checked the arguments."""
    return _gather(dy_RD.contiguous(), None, route.slot_TK)


def triton_unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route, clear: bool) -> Tensor:
    """See `mmkernels.moe.unpermute`, which has checked the arguments."""
    return _Unpermute.apply(y_RD, weight_TK, route.slot_TK, route.offset_E, clear)


def triton_unpermute_grads(
    do_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, route: Route, clear: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `mmkernels.moe.unpermute_grads`, which has checked the arguments."""
    y_RD, weight_TK = y_RD.contiguous(), weight_TK.contiguous()
    dy_RD = torch.empty_like(y_RD) if out is None else out
    return _unpermute_grads(do_TD.contiguous(), y_RD, weight_TK, dy_RD, route.slot_TK, route.offset_E, clear)


def triton_take_rows(x_ND: Tensor, index_M: Tensor, clear: bool, out: Tensor | None = None) -> Tensor:
    """See `mmkernels.moe.take_rows`, which has checked the arguments."""
    return _gather(x_ND.contiguous(), None, index_M[:, None], skip=not clear, out_TD=out)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, slot_TK: Tensor, offset_E: Tensor, rows: int, clear: bool) -> Tensor:
        ctx.save_for_backward(slot_TK)
        y_RD = torch.empty(rows, x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device)
        return _permute(x_TD, slot_TK, offset_E, y_RD, clear)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_RD: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return _gather(dy_RD.contiguous(), None, slot_TK), None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, y_RD: Tensor, weight_TK: Tensor, slot_TK: Tensor, offset_E: Tensor, clear: bool
    ) -> Tensor:
        y_RD, weight_TK, ctx.clear = y_RD.contiguous(), weight_TK.contiguous(), clear
        ctx.save_for_backward(y_RD, weight_TK, slot_TK, offset_E)
        return _gather(y_RD, weight_TK, slot_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_RD, weight_TK, slot_TK, offset_E = ctx.saved_tensors
        grads = _unpermute_grads(
            do_TD.contiguous(), y_RD, weight_TK, torch.empty_like(y_RD), slot_TK, offset_E, ctx.clear
        )
        return *grads, None, None, None


def _permute(x_TD: Tensor, slot_TK: Tensor, offset_E: Tensor, y_RD: Tensor, clear: bool) -> Tensor:
    """Copy tokens to their rows of y, which is returned."""
    x_TD, (tokens, width), block = x_TD.contiguous(), x_TD.shape, tuning.row_block(x_TD.shape[1])
    if y_RD.numel():
        permute_kernel[(tokens * triton.cdiv(width, block),)](
            x_TD, y_RD, slot_TK, offset_E, tokens, y_RD.shape[0],
            E=offset_E.shape[0], K=slot_TK.shape[1], D=width, BLOCK_D=block, CLEAR=clear, num_warps=tuning.warps(block),
        )  # fmt: skip
    return y_RD


def _unpermute_grads(
    do_TD: Tensor,
    y_RD: Tensor,
    weight_TK: Tensor,
    dy_RD: Tensor,
    slot_TK: Tensor,
    offset_E: Tensor,
    clear: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows, into `dy`, and of weights."""
    (tokens, width), dweight_TK = do_TD.shape, torch.empty_like(weight_TK)
    padded = triton.next_power_of_2(slot_TK.shape[1])
    block = tuning.reduce_block(width, padded)
    if tokens:
        unpermute_grad_kernel[(tokens,)](
            do_TD, y_RD, weight_TK, dy_RD, dweight_TK, slot_TK, offset_E, tokens, y_RD.shape[0],
            E=offset_E.shape[0], K=slot_TK.shape[1], D=width, KP=padded, BLOCK_D=block, CLEAR=clear,
            num_warps=tuning.warps(padded * block, tuning.REDUCE_ELEMENTS_PER_THREAD),
        )  # fmt: skip
    return dy_RD, dweight_TK


def _gather(
    y_RD: Tensor, weight_TK: Tensor | None, slot_TK: Tensor, skip: bool = False, out_TD: Tensor | None = None
) -> Tensor:
    """(Weighted) sum of each token's rows; `skip` leaves unwritten what has no row in its last slot."""
    (tokens, top_k), width = slot_TK.shape, y_RD.shape[1]
    if out_TD is None:
        out_TD = torch.empty(tokens, width, dtype=y_RD.dtype, device=y_RD.device)
    block = tuning.row_block(width)
    if out_TD.numel():
        gather_kernel[(tokens * triton.cdiv(width, block),)](
            y_RD, weight_TK, out_TD, slot_TK, y_RD.shape[0],
            K=top_k, D=width, BLOCK_D=block, WEIGHTED=weight_TK is not None, SKIP=skip, num_warps=tuning.warps(block),
        )  # fmt: skip
    return out_TD
