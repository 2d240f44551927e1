"""The autograd pair of a packed row: piece by piece, by whichever kernel takes the piece.

Legend: T tokens, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.softmax.backends import cudnn, flash, hopper
from mmkernels.softmax.backends.cudnn_buckets import bucket, lse_past_end, view_or_pad
from mmkernels.softmax.dispatch import Piece


class PackedAttention(Function):
    """Output and log-sum-exp (which carries no gradient). Inputs are read where they lie; results are joined once."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, pieces: list[Piece], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Each piece by its kernel."""
        parts = [_forward(piece, [q_THD, k_TGD, v_TGD], scale) for piece in pieces]
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
        return *packed_gradients([do_THD, *rows], lse_HT, ctx.pieces, ctx.scale), None, None


def packed_gradients(
    rows: list[Tensor], lse_HT: Tensor, pieces: list[Piece], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a row, from do, q, k, v and o; the probabilities are ``exp(score - lse)`` with the lse given."""
    parts = [_backward(piece, rows, lse_HT, scale) for piece in pieces]
    dq_THD, dk_TGD, dv_TGD = (_join(list(grads)) for grads in zip(*parts, strict=True))
    return dq_THD, dk_TGD, dv_TGD


def _forward(piece: Piece, qkv: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a piece, from q, k and v of the row."""
    start, stop = piece.tokens.start, piece.tokens.stop
    if piece.documents is not None:
        return hopper.forward_documents(*qkv, piece.documents, scale)
    if piece.block is None:
        return flash.forward(*(x[start:stop] for x in qkv), piece.cu_seqlens, piece.longest, scale)
    rows = bucket(stop - start) if piece.block is cudnn else stop - start
    o, lse = piece.block.forward(*(view_or_pad(x, start, rows) for x in qkv), True, scale)
    return o[: stop - start], lse[:, : stop - start]


def _backward(piece: Piece, tensors: list[Tensor], lse_HT: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a piece, from do, q, k, v and o of the row."""
    start, stop = piece.tokens.start, piece.tokens.stop
    if piece.others is not None:
        return _hopper_backward(piece, tensors, lse_HT, scale)
    if piece.block is None:
        do, q, k, v, o = (x[start:stop] for x in tensors)
        return flash.backward(do, q, k, v, o, lse_HT[:, start:stop], piece.cu_seqlens, piece.longest, scale)
    rows = bucket(stop - start) if piece.block is cudnn else stop - start
    do, q, k, v, o = (view_or_pad(x, start, rows) for x in tensors)
    lse = lse_past_end(lse_HT, start, stop - start, rows)
    dq, dk, dv = piece.block.backward(do, q, k, v, o, lse, True, scale)
    return dq[: stop - start], dk[: stop - start], dv[: stop - start]


def _hopper_backward(
    piece: Piece, tensors: list[Tensor], lse_HT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the row; its longest documents go through cuDNN, one after another, as each takes memory."""
    if piece.alone == (piece.tokens,):
        return _backward(Piece(piece.tokens, cudnn), tensors, lse_HT, scale)
    grads = hopper.backward_documents(*tensors, lse_HT, piece.others, scale)
    for tokens in piece.alone:
        for whole, part in zip(grads, _backward(Piece(tokens, cudnn), tensors, lse_HT, scale), strict=True):
            whole[tokens] = part
    return grads


def _join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """One contiguous tensor; a single part that is one already is not copied."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)
