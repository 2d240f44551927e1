"""Cross-entropy of a linear head that never holds the logits of more than a chunk of tokens.

The head may be split over the ranks of a group, each with some rows of the vocabulary: the loop over chunks is the same
one, with a :class:`VocabShard` that brings the ranks' tokens and statistics together.

Legend: T tokens, S tokens of this rank (T unless the head is split), D model width, V rows of the head on this rank
(the vocabulary unless it is split), C tokens of a chunk.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.cross_entropy import has_kernel, logits_to_gradient_, row_statistics
from mmtrain.model.gradient_sum import accumulate, gradient_sum_of, set_gradient_factor

IGNORE = -100


class LossCall(Protocol):
    """The loss that a model asks for: :func:`linear_cross_entropy`, or its like over a vocabulary split over ranks."""

    def __call__(self, x_SD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int) -> Tensor:
        """Sum over labelled tokens of -log softmax(W x)[label], a scalar in nats."""


class VocabShard(Protocol):
    """Rows `first` to `first + V` of a head that the ranks of a group hold together.

    Attributes:
        first: vocabulary index of row 0.
    """

    first: int

    def gather(self, x_SD: Tensor) -> Tensor:
        """Hidden states of all ranks' tokens, [T, D], in memory that may be written to."""

    def scatter_sum(self, dx_TD: Tensor) -> Tensor:
        """This rank's tokens [S, D] of the sum over ranks."""

    def reduce(self, stats_3C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest logit, sum of exp(logit - largest) and label's logit, [C] each, over the columns of all ranks.

        Args:
            stats_3C: the three over this rank's own columns; the label's logit is 0 where another rank has it.
        """


def linear_cross_entropy(
    x_SD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int, shard: VocabShard | None = None
) -> Tensor:
    """Sum over labelled tokens of -log softmax(W x)[label], in fp32.

    Logits exist for `chunk_tokens` tokens at a time. Their gradients are formed in the forward pass, while the chunk is
    at hand, so nothing is multiplied twice; peak memory is one chunk of logits and the gradients of x and W.

    Args:
        x_SD: final hidden states, any float dtype.
        weight_VD: the language-model head, same dtype.
        labels_T: int64; tokens labelled -100 (IGNORE) add nothing.
        chunk_tokens: C.
        shard: the part of the vocabulary that `weight` is; None: all of it.

    Returns:
        fp32 scalar (float64 for float64 input), in nats.
    """
    return _LinearCrossEntropy.apply(x_SD, weight_VD, labels_T, chunk_tokens, shard, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_SD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        chunk_tokens: int,
        shard: VocabShard | None,
        learns: bool,
    ) -> Tensor:
        need_x, need_w = (learns and needs for needs in ctx.needs_input_grad[:2])  # these do not know of no_grad
        x_TD = x_SD if shard is None else shard.gather(x_SD)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total = x_TD.new_zeros((), dtype=wide)
        # Gathered tokens are a copy of ours, whose chunks nothing reads again: gradients take their place.
        dx_TD = None if not need_x else torch.empty_like(x_TD) if shard is None else x_TD
        weight_total = gradient_sum_of(weight_VD) if need_w else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_w and weight_total is None else weight_total
        # The same buffers for all chunks: fresh memory of this size costs a third of the time on CPU, in page faults.
        logits_CV = x_TD.new_empty(min(chunk_tokens, x_TD.shape[0]), weight_VD.shape[0])
        wide_CV = None if has_kernel(logits_CV) else torch.empty_like(logits_CV, dtype=wide)
        for start in range(0, x_TD.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            rows = x_TD[part].shape[0]
            valid_C1 = (labels_T[part] != IGNORE)[:, None]
            torch.mm(x_TD[part], weight_VD.t(), out=logits_CV[:rows])
            log_prob_C, dlogits_CV = chunk_log_probs(
                logits_CV[:rows], labels_T[part], None if wide_CV is None else wide_CV[:rows], shard
            )
            total -= torch.where(valid_C1[:, 0], log_prob_C, 0).sum()
            # Unlabelled tokens are left out on the narrow side of each product: a pass over [C, V] less.
            if dweight_VD is not None:
                accumulate(dweight_VD, dlogits_CV, x_TD[part] * valid_C1)
            if dx_TD is not None:
                torch.mm(dlogits_CV, weight_VD, out=dx_TD[part]).mul_(valid_C1)
        dx_SD = dx_TD if dx_TD is None or shard is None else shard.scatter_sum(dx_TD)
        ctx.save_for_backward(dx_SD, None if weight_total is not None else dweight_VD)
        ctx.weight_dtype, ctx.weight = weight_VD.dtype, None if weight_total is None else weight_VD
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        dx_SD, dweight_VD = ctx.saved_tensors
        dx = None if dx_SD is None else dx_SD * grad.to(dx_SD.dtype)
        if ctx.weight is not None:
            set_gradient_factor(ctx.weight, grad)
        # Rounded while it is scaled: the table is the largest weight, and one more of it in fp32 would be the peak.
        dweight = None if dweight_VD is None else torch.empty_like(dweight_VD, dtype=ctx.weight_dtype)
        if dweight is not None:
            torch.mul(dweight_VD, grad, out=dweight)
        return dx, dweight, None, None, None, None


def chunk_log_probs(
    logits_CV: Tensor, labels_C: Tensor, wide_CV: Tensor | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a chunk's labels, and softmax - onehot of this rank's columns in the logits' dtype.

    Overwrites both buffers; the second return is one of them. Unlabelled tokens have some number in the first return,
    and some gradient in the second.

    Args:
        logits_CV: over this rank's columns.
        labels_C: int64; IGNORE for unlabelled tokens.
        wide_CV: scratch of the loss's dtype; None where kernels work in the logits' own memory.
        shard: the part of the vocabulary that the columns are; None: all of it.
    """
    if wide_CV is None:
        return _chunk_by_kernels(logits_CV, labels_C, shard)
    if shard is None:
        return _chunk_alone(logits_CV, labels_C, wide_CV)
    return _chunk_of_shard(logits_CV, labels_C, wide_CV, shard)


def _chunk_by_kernels(logits_CV: Tensor, labels_C: Tensor, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    local_C = labels_C if shard is None else labels_C - shard.first
    stats_3C = row_statistics(logits_CV, local_C)
    top_C, sum_C, label_C = stats_3C if shard is None else shard.reduce(stats_3C)
    log_prob_C = label_C - top_C - sum_C.log()
    logits_to_gradient_(logits_CV, local_C, top_C, sum_C, log_prob_C.expm1())
    return log_prob_C, logits_CV


def _chunk_alone(logits_CV: Tensor, labels_C: Tensor, log_prob_CV: Tensor) -> tuple[Tensor, Tensor]:
    target_C1 = torch.where(labels_C != IGNORE, labels_C, 0)[:, None]
    torch.log_softmax(logits_CV, -1, dtype=log_prob_CV.dtype, out=log_prob_CV)
    log_prob_C = log_prob_CV.gather(1, target_C1)[:, 0]
    dlogits_CV = log_prob_CV.exp_()
    dlogits_CV.scatter_add_(1, target_C1, dlogits_CV.new_full(target_C1.shape, -1.0))
    return log_prob_C, dlogits_CV if dlogits_CV.dtype == logits_CV.dtype else logits_CV.copy_(dlogits_CV)


def _chunk_of_shard(logits_CV: Tensor, labels_C: Tensor, probs_CV: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    rows, width = logits_CV.shape
    stats_3C = probs_CV.new_zeros(3, rows)
    if width:
        local_C, mine_C = own_rows(labels_C, shard.first, width)
        local_C1, mine_C1 = local_C[:, None], mine_C[:, None]
        torch.softmax(logits_CV, 1, dtype=probs_CV.dtype, out=probs_CV)
        top = logits_CV.max(1, keepdim=True)
        stats_3C[0] = top.values[:, 0]
        stats_3C[1] = probs_CV.gather(1, top.indices).reciprocal()[:, 0]
        stats_3C[2] = torch.where(mine_C1, logits_CV.gather(1, local_C1), 0)[:, 0]
    else:
        stats_3C[0] = -torch.inf
    top_C, sum_C, label_C = shard.reduce(stats_3C)
    log_prob_C = label_C - top_C - sum_C.log()
    if width:
        share_C = stats_3C[1] * (stats_3C[0] - top_C).exp() / sum_C  # probability of all of this rank's rows
        torch.mul(probs_CV, share_C[:, None], out=logits_CV)
        # From the log-probability in full: p - 1 of a rounded p near 1 has no digits left.
        at_label_C1 = log_prob_C.expm1()[:, None].to(logits_CV.dtype)
        logits_CV.scatter_(1, local_C1, torch.where(mine_C1, at_label_C1, logits_CV.gather(1, local_C1)))
    return log_prob_C, logits_CV


def own_rows(ids_T: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Row numbers in this rank's part of a table, 0 for ids of other ranks, and whether the id is this rank's.

    Args:
        ids_T: int64, vocabulary indices.
        first: index of the part's row 0.
        count: its rows.
    """
    local_T = ids_T - first
    mine_T = (local_T >= 0) & (local_T < count)
    return torch.where(mine_T, local_T, 0), mine_T
