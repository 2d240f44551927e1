"""Cross-entropy of a linear head that never holds the logits of more than a chunk of tokens.

Legend: T tokens, D model width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

IGNORE = -100


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int) -> Tensor:
    """Sum over labelled tokens of -log softmax(W x)[label], in fp32.

    Logits exist for `chunk_tokens` tokens at a time. Their gradients are formed in the forward pass, while the chunk is
    at hand, so nothing is multiplied twice; peak memory is one chunk of logits and the gradients of x and W.

    Args:
        x_TD: final hidden states, any float dtype.
        weight_VD: the language-model head, same dtype.
        labels_T: int64; tokens labelled -100 (IGNORE) add nothing.
        chunk_tokens: C.

    Returns:
        fp32 scalar (float64 for float64 input), in nats.
    """
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, chunk_tokens)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int) -> Tensor:
        need_x, need_w = ctx.needs_input_grad[:2]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total = x_TD.new_zeros((), dtype=wide)
        dx_TD = torch.empty_like(x_TD) if need_x else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_w else None
        for start in range(0, x_TD.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            loss, dlogits_CV = _chunk(F.linear(x_TD[part], weight_VD), labels_T[part], wide, need_x or need_w)
            total += loss
            if dx_TD is not None:
                torch.mm(dlogits_CV, weight_VD, out=dx_TD[part])
            if dweight_VD is not None:
                _accumulate(dweight_VD, dlogits_CV, x_TD[part])
        ctx.save_for_backward(dx_TD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dx_TD, dweight_VD = ctx.saved_tensors
        dx = None if dx_TD is None else dx_TD * grad.to(dx_TD.dtype)
        dweight = None if dweight_VD is None else (dweight_VD * grad).to(ctx.weight_dtype)
        return dx, dweight, None, None


def _chunk(logits_CV: Tensor, labels_C: Tensor, wide: torch.dtype, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Loss of one chunk and softmax - onehot, zero where unlabelled, in the logits' dtype."""
    valid_C = labels_C != IGNORE
    target_C1 = torch.where(valid_C, labels_C, 0)[:, None]
    log_prob_CV = logits_CV.to(wide).log_softmax(-1)
    loss = -(log_prob_CV.gather(1, target_C1).squeeze(1) * valid_C).sum()
    if not need_grad:
        return loss, logits_CV
    dlogits_CV = log_prob_CV.exp_().mul_(valid_C[:, None])
    dlogits_CV.scatter_add_(1, target_C1, -valid_C[:, None].to(wide))
    return loss, dlogits_CV.to(logits_CV.dtype)


def _accumulate(total_VD: Tensor, dlogits_CV: Tensor, x_CD: Tensor) -> None:
    """Total += dlogits^T x, in total's dtype."""
    if total_VD.dtype == x_CD.dtype:
        total_VD.addmm_(dlogits_CV.t(), x_CD)
    else:
        total_VD += dlogits_CV.t() @ x_CD
