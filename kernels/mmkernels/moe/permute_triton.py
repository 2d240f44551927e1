"""Permute and unpermute on Triton: one launch each, forward and backward.

Legend: T tokens, D model width, K experts a token, R rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.moe import tuning
from mmkernels.moe.layout import NewRows, Route
from mmkernels.moe.permute_kernels import gather_kernel, permute_kernel, unpermute_grad_kernel


def triton_permute(x_TD: Tensor, route: Route, clear: bool, rows: NewRows | None = None) -> Tensor:
    """See `mmkernels.moe.permute`, which has checked the arguments."""
    return _Permute.apply(x_TD, route.slot_TK, route.offset_E, route.token_R.shape[0], clear, rows)


def triton_unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route, clear: bool, rows: NewRows | None = None) -> Tensor:
    """See `mmkernels.moe.unpermute`, which has checked the arguments."""
    return _Unpermute.apply(y_RD, weight_TK, route.slot_TK, route.offset_E, clear, rows)


def triton_take_rows(x_ND: Tensor, index_M: Tensor, clear: bool, out: Tensor | None = None) -> Tensor:
    """See `mmkernels.moe.take_rows`, which has checked the arguments."""
    return _gather(x_ND.contiguous(), None, index_M[:, None], skip=not clear, out_TD=out)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TD: Tensor,
        slot_TK: Tensor,
        offset_E: Tensor,
        number: int,
        clear: bool,
        rows: NewRows | None,
    ) -> Tensor:
        ctx.save_for_backward(slot_TK)
        x_TD, (tokens, width), top_k = x_TD.contiguous(), x_TD.shape, slot_TK.shape[1]
        y_RD = _new_rows(number, x_TD, rows)
        block = tuning.row_block(width)
        if y_RD.numel():
            permute_kernel[(tokens * triton.cdiv(width, block),)](
                x_TD, y_RD, slot_TK, offset_E, tokens, number,
                E=offset_E.shape[0], K=top_k, D=width, BLOCK_D=block, CLEAR=clear, num_warps=tuning.warps(block),
            )  # fmt: skip
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_RD: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return _gather(dy_RD.contiguous(), None, slot_TK), None, None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y_RD: Tensor,
        weight_TK: Tensor,
        slot_TK: Tensor,
        offset_E: Tensor,
        clear: bool,
        rows: NewRows | None,
    ) -> Tensor:
        y_RD, weight_TK, ctx.clear, ctx.rows = y_RD.contiguous(), weight_TK.contiguous(), clear, rows
        ctx.save_for_backward(y_RD, weight_TK, slot_TK, offset_E)
        return _gather(y_RD, weight_TK, slot_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        y_RD, weight_TK, slot_TK, offset_E = ctx.saved_tensors
        (tokens, width), do_TD = do_TD.shape, do_TD.contiguous()
        dy_RD, dweight_TK = _new_rows(y_RD.shape[0], y_RD, ctx.rows), torch.empty_like(weight_TK)
        padded = triton.next_power_of_2(slot_TK.shape[1])
        block = tuning.reduce_block(width, padded)
        if tokens:
            unpermute_grad_kernel[(tokens,)](
                do_TD, y_RD, weight_TK, dy_RD, dweight_TK, slot_TK, offset_E, tokens, y_RD.shape[0],
                E=offset_E.shape[0], K=slot_TK.shape[1], D=width, KP=padded, BLOCK_D=block, CLEAR=ctx.clear,
                num_warps=tuning.warps(padded * block, tuning.REDUCE_ELEMENTS_PER_THREAD),
            )  # fmt: skip
        return dy_RD, dweight_TK, None, None, None, None


def _new_rows(number: int, like_ND: Tensor, rows: NewRows | None) -> Tensor:
    width, dtype = like_ND.shape[1], like_ND.dtype
    return (
        torch.empty(number, width, dtype=dtype, device=like_ND.device) if rows is None else rows(number, width, dtype)
    )


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
