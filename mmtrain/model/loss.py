"""Cross-entropy of a linear head that never holds the logits of more than a chunk of tokens.

Legend: T tokens, D model width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.cross_entropy import has_kernel, logits_to_gradient_, row_statistics

IGNORE = -100
LossCall = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Arguments and result of :func:`linear_cross_entropy`."""


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
        # The same buffers for all chunks: fresh memory of this size costs a third of the time on CPU, in page faults.
        rows = min(chunk_tokens, x_TD.shape[0])
        logits_CV = x_TD.new_empty(rows, weight_VD.shape[0])
        log_prob_CV = None if has_kernel(logits_CV) else torch.empty_like(logits_CV, dtype=wide)
        for start in range(0, x_TD.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            rows = x_TD[part].shape[0]
            valid_C1 = (labels_T[part] != IGNORE)[:, None]
            torch.mm(x_TD[part], weight_VD.t(), out=logits_CV[:rows])
            if log_prob_CV is None:
                loss, dlogits_CV = _chunk_in_place(logits_CV[:rows], labels_T[part], valid_C1[:, 0])
            else:
                loss, dlogits_CV = _chunk(logits_CV[:rows], labels_T[part], valid_C1, log_prob_CV[:rows])
            total += loss
            # Unlabelled tokens are left out on the narrow side of each product: a pass over [C, V] less.
            if dx_TD is not None:
                torch.mm(dlogits_CV, weight_VD, out=dx_TD[part]).mul_(valid_C1)
            if dweight_VD is not None:
                accumulate(dweight_VD, dlogits_CV, x_TD[part] * valid_C1)
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


def _chunk(logits_CV: Tensor, labels_C: Tensor, valid_C1: Tensor, log_prob_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of one chunk over its labelled tokens, and softmax - onehot of every token in the logits' dtype.

    Overwrites both buffers; the second return is one of them.
    """
    target_C1 = torch.where(valid_C1, labels_C[:, None], 0)
    torch.log_softmax(logits_CV, -1, dtype=log_prob_CV.dtype, out=log_prob_CV)
    loss = -(log_prob_CV.gather(1, target_C1) * valid_C1).sum()
    dlogits_CV = log_prob_CV.exp_()
    dlogits_CV.scatter_add_(1, target_C1, dlogits_CV.new_full(target_C1.shape, -1.0))
    return loss, dlogits_CV if dlogits_CV.dtype == logits_CV.dtype else logits_CV.copy_(dlogits_CV)


def _chunk_in_place(logits_CV: Tensor, labels_C: Tensor, valid_C: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the logits' own memory, by kernels."""
    top_C, sum_C, label_C = row_statistics(logits_CV, labels_C)
    log_prob_C = label_C - top_C - sum_C.log()
    logits_to_gradient_(logits_CV, labels_C, top_C, sum_C, log_prob_C.expm1())
    return -torch.where(valid_C, log_prob_C, 0).sum(), logits_CV


def accumulate(total_VD: Tensor, dlogits_CV: Tensor, x_CD: Tensor) -> None:
    """Total += dlogits^T x, in total's dtype."""
    if total_VD.dtype == x_CD.dtype:
        total_VD.addmm_(dlogits_CV.t(), x_CD)
    elif total_VD.is_cuda and total_VD.numel():  # added inside the product, which is neither rounded nor stored
        torch.addmm(total_VD, dlogits_CV.t(), x_CD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD += dlogits_CV.t() @ x_CD
