"""Log-probabilities of documents' labels, with gradients, from a linear head whose logits exist a chunk at a time.

Each document's sum gets a gradient of its own, which is not known before all sums are. Backward therefore computes a
chunk's logits again, where `mmtrain.model.loss` forms gradients of the one sum in forward: the head's product is made
once more, and of the forward pass nothing is kept but the hidden states.

Legend: T tokens, S tokens of this rank (T unless the head is split), N documents, D model width, V rows of the head on
this rank (the vocabulary unless it is split), C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.cross_entropy import has_kernel
from mmtrain.model.gradient_sum import accumulate, gradient_sum_of, set_gradient_factor
from mmtrain.model.loss import IGNORE, VocabShard, chunk_log_probs


class DocumentScoreCall(Protocol):
    """The sums that a model asks for: :func:`document_log_probs`, or its like over a vocabulary split over ranks."""

    def __call__(
        self, x_SD: Tensor, weight_VD: Tensor, labels_T: Tensor, document_T: Tensor, documents: int, chunk_tokens: int
    ) -> Tensor:
        """Sum, for each document, log softmax(W x)[label] over its labelled tokens."""


def document_log_probs(
    x_SD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    document_T: Tensor,
    documents: int,
    chunk_tokens: int,
    shard: VocabShard | None = None,
) -> Tensor:
    """Sum log softmax(W x)[label] over the labelled tokens of each document.

    Args:
        x_SD: final hidden states, any float dtype.
        weight_VD: the language-model head, same dtype.
        labels_T: int64; tokens labelled -100 (IGNORE) add nothing and get no gradient.
        document_T: int64, number of each token's document (`Packing.document_T`); in any order.
        documents: N.
        chunk_tokens: C.
        shard: the part of the vocabulary that `weight` is; None: all of it.

    Returns:
        float64 [N], in nats, 0 for a document without labels; the same on every rank of the shard's group. In fp32 the
        sum of a million tokens would have steps of 0.06, and preferences are about differences of such sums.
    """
    return _DocumentLogProbs.apply(x_SD, weight_VD, labels_T, document_T, documents, chunk_tokens, shard)


class _DocumentLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_SD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        document_T: Tensor,
        documents: int,
        chunk_tokens: int,
        shard: VocabShard | None,
    ) -> Tensor:
        ctx.save_for_backward(x_SD, weight_VD, labels_T, document_T)
        ctx.chunk_tokens, ctx.shard = chunk_tokens, shard
        x_TD = x_SD if shard is None else shard.gather(x_SD)
        sums_N = x_SD.new_zeros(documents, dtype=torch.float64)
        for part, log_prob_C, _ in _chunks(x_TD, weight_VD, labels_T, chunk_tokens, shard):
            labelled_C = torch.where(labels_T[part] != IGNORE, log_prob_C.double(), 0)
            sums_N.index_add_(0, document_T[part], labelled_C)
        return sums_N

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weight_VD, labels_T, document_T = ctx.saved_tensors
        shard, (need_x, need_w) = ctx.shard, ctx.needs_input_grad[:2]
        x_TD = x_SD if shard is None else shard.gather(x_SD)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        # Of minus the log-probability, whose gradient a chunk has; on the narrow side of both products.
        factor_T1 = torch.where(labels_T != IGNORE, -grad_N[document_T], 0).to(wide)[:, None]
        dx_TD = torch.empty_like(x_TD) if need_x else None
        total_VD = gradient_sum_of(weight_VD) if need_w else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_w and total_VD is None else total_VD
        for part, _, dlogits_CV in _chunks(x_TD, weight_VD, labels_T, ctx.chunk_tokens, shard):
            if dweight_VD is not None:
                accumulate(dweight_VD, dlogits_CV, (x_TD[part] * factor_T1[part]).to(x_TD.dtype))
            if dx_TD is not None:
                dx_TD[part] = (dlogits_CV @ weight_VD) * factor_T1[part]
        if total_VD is not None:  # its sum is of gradients of the loss itself
            set_gradient_factor(weight_VD, grad_N.new_ones((), dtype=total_VD.dtype))
        if dx_TD is not None and shard is not None:
            dx_TD = shard.scatter_sum(dx_TD)
        dweight = None if dweight_VD is None or total_VD is not None else dweight_VD.to(weight_VD.dtype)
        return dx_TD, dweight, None, None, None, None, None


def _chunks(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int, shard: VocabShard | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a chunk's place, log-probabilities of its labels [C], and softmax - onehot, which the next overwrites."""
    logits_CV = x_TD.new_empty(min(chunk_tokens, x_TD.shape[0]), weight_VD.shape[0])
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    wide_CV = None if has_kernel(logits_CV) else torch.empty_like(logits_CV, dtype=wide)
    for start in range(0, x_TD.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        rows = x_TD[part].shape[0]
        torch.mm(x_TD[part], weight_VD.t(), out=logits_CV[:rows])
        scratch = None if wide_CV is None else wide_CV[:rows]
        yield part, *chunk_log_probs(logits_CV[:rows], labels_T[part], scratch, shard)
