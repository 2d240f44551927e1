"""The autograd pair of a packed row: piece by piece, by whichever kernel takes the piece.

Legend: T tokens, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.softmax import flash
from mmkernels.softmax.dispatch import Piece


class PackedAttention(Function):
    """Output and log-sum-exp (which carries no gradient). Inputs are read where they lie; results are joined once."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, pieces: list[Piece], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Each piece by its kernel."""
        parts = [_forward(piece, [x[piece.tokens] for x in (q_THD, k_TGD, v_TGD)], scale) for piece in pieces]
        o_THD, lse_HT = _join([o for o, _ in parts]), _join([lse for _, lse in parts], dim=1)
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, o_THD, lse_HT)
        ctx.pieces, ctx.scale = pieces, scale
        ctx.mark_non_differentiable(lse_HT)
        return o_THD, lse_HT

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_THD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Each piece by the same kernel, from the log-sum-exp."""
        *rows, lse_HT = ctx.saved_tensors
        parts = []
        for piece in ctx.pieces:
            do, q, k, v, o = (x[piece.tokens] for x in (do_THD, *rows))
            parts.append(_backward(piece, do, [q, k, v], o, lse_HT[:, piece.tokens], ctx.scale))
        dq_THD, dk_TGD, dv_TGD = (_join(list(grads)) for grads in zip(*parts, strict=True))
        return dq_THD, dk_TGD, dv_TGD, None, None


def _forward(piece: Piece, qkv: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    if piece.block is None:
        return flash.forward(*qkv, piece.cu_seqlens, piece.longest, scale)
    return piece.block.forward(*qkv, True, scale)


def _backward(
    piece: Piece, do_THD: Tensor, qkv: list[Tensor], o_THD: Tensor, lse_HT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if piece.block is None:
        return flash.backward(do_THD, *qkv, o_THD, lse_HT, piece.cu_seqlens, piece.longest, scale)
    return piece.block.backward(do_THD, *qkv, o_THD, lse_HT, True, scale)


def _join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """One contiguous tensor; a single part that is one already is not copied."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)
