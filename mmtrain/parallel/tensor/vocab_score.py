"""Score of labelled tokens where the head's rows are split over a tensor-parallel group (`mmtrain.model.label_score`).

Legend: T tokens of the group, W ranks, S = T / W consecutive tokens of this rank, M labelled ones of the T, D model
width, N rows of the head on this rank, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.model.label_score import LabelScore, score_labels
from mmtrain.model.loss import own_rows
from mmtrain.parallel.collectives import gather_rows, sum_in_place


class VocabParallelScore:
    """The model's `ScoreCall` over rows `first` to `first + N` of a head that the ranks of a group hold together.

    It is the `ScoreShard` too. Only the hidden states of labelled tokens travel, not those of all T.

    Args:
        first: vocabulary index of this rank's row 0.
        group: the ranks, in the order of their tokens.
    """

    def __init__(self, first: int, group: ProcessGroup) -> None:
        self.first, self.group = first, group

    def __call__(self, x_SD: Tensor, weight_ND: Tensor, labels_T: Tensor, chunk_tokens: int) -> LabelScore:
        """Score over all T tokens, whose labels are the same on every rank; so is the result, to the bit."""
        return score_labels(x_SD, weight_ND, labels_T, chunk_tokens, self)

    def select(self, x_SD: Tensor, index_M: Tensor) -> Tensor:
        """Hidden states [M, D] of the tokens at these places of all T; a sum with one term that is not 0 is exact."""
        local_M, mine_M = own_rows(index_M, self.group.rank() * x_SD.shape[0], x_SD.shape[0])
        return sum_in_place(torch.where(mine_M[:, None], x_SD[local_M], 0), self.group)

    def gather(self, stats_4C: Tensor) -> Tensor:
        """Statistics of all ranks, [W, 4, C]."""
        return gather_rows(stats_4C, self.group).view(self.group.size(), *stats_4C.shape)
