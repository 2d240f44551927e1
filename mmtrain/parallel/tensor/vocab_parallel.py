"""Embedding and loss of a vocabulary split over the ranks of a tensor-parallel group, with sequence parallelism.

Outside of these functions each rank holds consecutive T / W of the tokens; inside, its rows of the table for all T.
A rank's rows begin at `first`; ranks may hold different numbers of rows, or none.

Legend: T tokens of the group, W ranks, S = T / W tokens of this rank, D model width, N rows of this rank out of the
vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mmkernels.cross_entropy import has_kernel, logits_to_gradient_, row_statistics
from mmtrain.model.loss import IGNORE, accumulate, linear_cross_entropy
from mmtrain.parallel.collectives import gather_rows, scatter_sum_rows


class VocabParallelLookup:
    """The embedding's lookup where ranks hold consecutive rows of the table (`mmtrain.model.embedding`).

    Args:
        first: vocabulary index of this rank's row 0.
        group: the ranks that hold the table together.
    """

    def __init__(self, first: int, group: ProcessGroup) -> None:
        self.first, self.group = first, group

    def __call__(self, tokens_T: Tensor, weight_ND: Tensor) -> Tensor:
        """Return the embeddings of this rank's T / W tokens, [T / W, D]."""
        return vocab_parallel_embedding(tokens_T, weight_ND, self.first, self.group)


def vocab_parallel_embedding(tokens_T: Tensor, weight_ND: Tensor, first: int, group: ProcessGroup) -> Tensor:
    """Return the embeddings of this rank's T / W tokens.

    Each rank looks up the tokens that it has rows for, and a reduce-scatter hands them out.

    Args:
        tokens_T: int64, all tokens of the group, the same on every rank; W divides T.
        weight_ND: rows `first` to `first + N` of the table, any float dtype.
        first: vocabulary index of row 0.
        group: the ranks that hold the table together.

    Returns:
        [T / W, D], the dtype of the weight. The sum has one term that is not 0, so it is exact.
    """
    if weight_ND.shape[0]:
        local_T, mine_T = _own(tokens_T, first, weight_ND.shape[0])
        rows_TD = F.embedding(local_T, weight_ND).masked_fill(~mine_T[:, None], 0)
    else:  # zeros that depend on the weight: this rank too must take part in the collective of the backward
        rows_TD = weight_ND.sum(0).expand(tokens_T.shape[0], -1)
    return scatter_sum_rows(rows_TD, group)


def vocab_parallel_cross_entropy(
    x_SD: Tensor, weight_ND: Tensor, labels_T: Tensor, first: int, chunk_tokens: int, group: ProcessGroup
) -> Tensor:
    """`mmtrain.model.loss.linear_cross_entropy` over all T tokens, with the head split over the group.

    Logits [C, N] exist for one chunk at a time and stay on their rank; ranks exchange three numbers a token. Gradients
    are formed in the forward pass: one gather of x before, one reduce-scatter of its gradient after all chunks.

    Args:
        x_SD: final hidden states of this rank's tokens, any float dtype.
        weight_ND: rows `first` to `first + N` of the head, same dtype.
        labels_T: int64, the labels of all T = S W tokens, the same on every rank; -100 (IGNORE) adds nothing.
        first: vocabulary index of row 0.
        chunk_tokens: C.
        group: the ranks that hold the head together.

    Returns:
        fp32 scalar (float64 for float64 input), in nats: the sum over all T tokens, bitwise the same on every rank.
        It is one loss, not W: every rank calls backward with the same gradient and gets its part of the gradients.

    Raises:
        ValueError: there are not T = S W labels.
    """
    if labels_T.shape[0] != x_SD.shape[0] * group.size():
        raise ValueError(f"{labels_T.shape[0]} labels for {group.size()} ranks with {x_SD.shape[0]} tokens each")
    if group.size() == 1:
        return linear_cross_entropy(x_SD, weight_ND, labels_T, chunk_tokens)
    return _VocabParallelCrossEntropy.apply(x_SD, weight_ND, labels_T, first, chunk_tokens, group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_SD: Tensor, weight_ND: Tensor, labels_T: Tensor, first: int, chunk_tokens: int,
        group: ProcessGroup,
    ) -> Tensor:  # fmt: skip
        need_x, need_w = ctx.needs_input_grad[:2]
        x_TD = gather_rows(x_SD, group)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total = x_TD.new_zeros((), dtype=wide)
        dweight_ND = torch.zeros_like(weight_ND, dtype=wide) if need_w else None
        rows = min(chunk_tokens, x_TD.shape[0])
        logits_CN = x_TD.new_empty(rows, weight_ND.shape[0])
        probs_CN = None if has_kernel(logits_CN) else torch.empty_like(logits_CN, dtype=wide)
        for x_CD, labels_C in zip(x_TD.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True):
            rows = x_CD.shape[0]
            valid_C1 = (labels_C != IGNORE)[:, None]
            torch.mm(x_CD, weight_ND.t(), out=logits_CN[:rows])
            if probs_CN is None:
                loss, dlogits_CN = _chunk_in_place(logits_CN[:rows], labels_C, valid_C1[:, 0], first, group)
            else:
                loss, dlogits_CN = _chunk(logits_CN[:rows], labels_C, valid_C1, first, probs_CN[:rows], group)
            total += loss
            if dweight_ND is not None:
                accumulate(dweight_ND, dlogits_CN, x_CD * valid_C1)
            # Nothing reads this chunk of x again, and it is a copy of ours: its gradient takes its place.
            if need_x:
                torch.mm(dlogits_CN, weight_ND, out=x_CD).mul_(valid_C1)
        ctx.save_for_backward(scatter_sum_rows(x_TD, group) if need_x else None, dweight_ND)
        ctx.weight_dtype = weight_ND.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_SD, dweight_ND = ctx.saved_tensors
        dx = None if dx_SD is None else dx_SD * grad.to(dx_SD.dtype)
        dweight = None if dweight_ND is None else (dweight_ND * grad).to(ctx.weight_dtype)
        return dx, dweight, None, None, None, None


def _chunk(
    logits_CN: Tensor, labels_C: Tensor, valid_C1: Tensor, first: int, probs_CN: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Loss of one chunk over its labelled tokens, and this rank's columns of softmax - onehot in the logits' dtype.

    Overwrites both buffers; the second return is the logits'. Unlabelled tokens have some gradient there.
    """
    (rows, width), wide = logits_CN.shape, probs_CN.dtype
    stats_3C = probs_CN.new_zeros(3, rows)  # this rank's largest logit, sum of exp(logit - largest), label's logit or 0
    if width:
        local_C, mine_C = _own(labels_C, first, width)
        local_C1, mine_C1 = local_C[:, None], mine_C[:, None]
        torch.softmax(logits_CN, 1, dtype=wide, out=probs_CN)
        top = logits_CN.max(1, keepdim=True)
        stats_3C[0] = top.values[:, 0]
        stats_3C[1] = probs_CN.gather(1, top.indices).reciprocal()[:, 0]
        stats_3C[2] = torch.where(mine_C1, logits_CN.gather(1, local_C1), 0)[:, 0]
    else:
        stats_3C[0] = -torch.inf
    top_C, sum_C, log_prob_C = _of_all_ranks(stats_3C, group)
    loss = -(log_prob_C[:, None] * valid_C1).sum()
    if width:
        share_C = stats_3C[1] * (stats_3C[0] - top_C).exp() / sum_C  # probability of all of this rank's rows
        torch.mul(probs_CN, share_C[:, None], out=logits_CN)
        # From the log-probability in full: p - 1 of a rounded p near 1 has no digits left.
        at_label_C1 = log_prob_C.expm1()[:, None].to(logits_CN.dtype)
        logits_CN.scatter_(1, local_C1, torch.where(mine_C1, at_label_C1, logits_CN.gather(1, local_C1)))
    return loss, logits_CN


def _chunk_in_place(
    logits_CN: Tensor, labels_C: Tensor, valid_C: Tensor, first: int, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The same in the logits' own memory, by kernels."""
    local_C = labels_C - first
    top_C, sum_C, log_prob_C = _of_all_ranks(row_statistics(logits_CN, local_C), group)
    logits_to_gradient_(logits_CN, local_C, top_C, sum_C, log_prob_C.expm1())
    return -torch.where(valid_C, log_prob_C, 0).sum(), logits_CN


def _of_all_ranks(stats_3C: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest) and the label's log-probability, over the columns of all ranks."""
    # One small gather where all-reduces would be two, of a maximum and of sums; every rank adds up in the same order.
    top_WC, sum_WC, label_WC = gather_rows(stats_3C, group).view(group.size(), 3, -1).unbind(1)
    top_C = top_WC.amax(0)
    sum_C = (sum_WC * (top_WC - top_C).exp()).sum(0)
    return top_C, sum_C, label_WC.sum(0) - top_C - sum_C.log()


def _own(ids_T: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Row numbers in this rank's part of the table, 0 for ids of other ranks, and whether the id is this rank's."""
    local_T = ids_T - first
    mine_T = (local_T >= 0) & (local_T < count)
    return torch.where(mine_T, local_T, 0), mine_T
