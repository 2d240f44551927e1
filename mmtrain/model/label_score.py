"""Score of labelled tokens: how many of their labels are the argmax of the logits, without gradients.

Only the hidden states of labelled tokens meet the head, so a row of a million tokens with ten labels costs ten rows of
logits. The head may be split over the ranks of a group: the same code with a :class:`ScoreShard`, which brings four
numbers a token of every rank together.

Legend: T tokens, S tokens of this rank (T unless the head is split), M labelled ones of the T, D model width, V rows of
the head on this rank (the vocabulary unless it is split), C tokens of a chunk, W ranks that hold the head together.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmtrain.model.loss import IGNORE, own_rows


class LabelScore(NamedTuple):
    """Sums over the labelled tokens of a micro-batch; parts of a row, scored apart, add up to the row's.

    Attributes:
        labelled: int64 scalar, their number.
        correct: int64 scalar, those whose label has the largest logit. Of equal logits the lowest index is the largest;
            where a logit is not a number, nothing is correct.
        ce_sum: fp32 scalar (float64 for float64 input), -log softmax(W x)[label] in nats.
    """

    labelled: Tensor
    correct: Tensor
    ce_sum: Tensor


class ScoreCall(Protocol):
    """The score that a model asks for: :func:`score_labels`, or its like over a vocabulary split over ranks."""

    def __call__(self, x_SD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int) -> LabelScore:
        """Score of the tokens that `labels` does not ignore."""


class ScoreShard(Protocol):
    """Rows `first` to `first + V` of a head that the ranks of a group hold together.

    Attributes:
        first: vocabulary index of row 0.
    """

    first: int

    def select(self, x_SD: Tensor, index_M: Tensor) -> Tensor:
        """Hidden states [M, D] of the tokens at these places of all ranks' T tokens, on every rank."""

    def gather(self, stats_4C: Tensor) -> Tensor:
        """Statistics of all ranks, [W, 4, C]."""


def score_labels(
    x_SD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int, shard: ScoreShard | None = None
) -> LabelScore:
    """Score the labelled tokens, in chunks. The host waits for the device once, to learn how many there are.

    Args:
        x_SD: final hidden states, any float dtype, in which logits are computed, as they are for the loss.
        weight_VD: the language-model head, same dtype.
        labels_T: int64; tokens labelled -100 (IGNORE) are passed over.
        chunk_tokens: C.
        shard: the part of the vocabulary that `weight` is; None: all of it.

    Returns:
        The same figures on every rank of the shard's group.
    """
    index_M = (labels_T != IGNORE).nonzero()[:, 0]
    x_MD = x_SD[index_M] if shard is None else shard.select(x_SD, index_M)
    labels_M = labels_T[index_M]
    wide = torch.promote_types(x_SD.dtype, torch.float32)
    correct, ce_sum = labels_M.new_zeros(()), x_SD.new_zeros((), dtype=wide)
    first = 0 if shard is None else shard.first
    for x_CD, labels_C in zip(x_MD.split(chunk_tokens), labels_M.split(chunk_tokens), strict=True):
        stats_4C = _statistics((x_CD @ weight_VD.t()).to(wide), labels_C, first)
        right_C, ce_C = _merge(stats_4C[None] if shard is None else shard.gather(stats_4C), labels_C)
        correct, ce_sum = correct + right_C.sum(), ce_sum + ce_C.sum()
    return LabelScore(correct.new_tensor(len(index_M)), correct, ce_sum)


def _statistics(logits_CV: Tensor, labels_C: Tensor, first: int) -> Tensor:
    """Over this rank's columns: largest logit, its index, sum of exp(logit - largest), label's logit (0: not here).

    Vocabulary indices are exact in fp32 up to 2^24.
    """
    rows, width = logits_CV.shape
    if not width:  # more ranks than rows of the head
        return torch.stack([logits_CV.new_full((rows,), value) for value in (-torch.inf, 0.0, 0.0, 0.0)])
    top_C, index_C = logits_CV.max(1)  # the first of equal ones
    local_C, mine_C = own_rows(labels_C, first, width)
    label_C = torch.where(mine_C, logits_CV.gather(1, local_C[:, None])[:, 0], 0)
    sum_C = (logits_CV - top_C[:, None]).exp().sum(1)
    return torch.stack([top_C, (index_C + first).to(top_C.dtype), sum_C, label_C])


def _merge(stats_W4C: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each label is the argmax over all ranks' columns, and its cross-entropy, [C] each."""
    top_WC, index_WC, sum_WC, label_WC = stats_W4C.unbind(1)
    best_C = top_WC.amax(0)
    winner_C = torch.where(top_WC == best_C, index_WC, torch.inf).amin(0)  # no number equals NaN
    total_C = (sum_WC * (top_WC - best_C).exp()).sum(0)
    return winner_C == labels_C, best_C + total_C.log() - label_WC.sum(0)
