"""The seams of tensor parallelism where every rank holds all tokens, and what ranks have parts of is summed over them.

Training shares the tokens between modules out over the ranks (`mmtrain.parallel.tensor`), which saves memory that waits
for backward. Inference has no backward, and a decode step may have fewer tokens than there are ranks: here nothing need
divide, and a layer costs one all-reduce where it would cost a gather and a reduce-scatter, which move as much.

An all-reduce gives all ranks the same bits, on which routers depend: each decides on its own which expert has a token.

Legend: T tokens, W ranks, D model width, V vocabulary, N rows of this rank out of the vocabulary, ceil(V / W) at most.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.model.linear import Linear
from mmtrain.model.loss import own_rows
from mmtrain.parallel.collectives import gather_rows, sum_in_place


class SameTokensRegion:
    """Tokens that every rank has already; each works on all of them with a part of the weights.

    Args:
        group: the ranks that hold the weights together.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def gather_from(self, x_TD: Tensor) -> Tensor:
        """Return x itself."""
        return x_TD

    def reduce_scatter_to(self, partial_TD: Tensor) -> Tensor:
        """Replace partial results by their sum over the ranks, all tokens on each. There is no backward."""
        return sum_in_place(partial_TD, self.group)


class SameTokensLookup:
    """The embedding's lookup where ranks hold consecutive rows of the table.

    Args:
        first: vocabulary index of this rank's row 0.
        group: the ranks that hold the table together.
    """

    def __init__(self, first: int, group: ProcessGroup) -> None:
        self.first, self.group = first, group

    def __call__(self, tokens_T: Tensor, weight_ND: Tensor) -> Tensor:
        """Return the embeddings of all tokens, [T, D]; the sum has one term that is not 0, so it is exact."""
        if not weight_ND.shape[0]:
            return sum_in_place(weight_ND.new_zeros(tokens_T.shape[0], weight_ND.shape[1]), self.group)
        local_T, mine_T = own_rows(tokens_T, self.first, weight_ND.shape[0])
        return sum_in_place(F.embedding(local_T, weight_ND).masked_fill(~mine_T[:, None], 0), self.group)


class GatheredHead(Linear):
    """The head where ranks hold consecutive rows of it: its logits are those of all ranks, bit for bit alike on each.

    Args:
        head: whose weight it takes over, split over the ranks already.
        vocab_size: V.
        group: the ranks that hold it together.
    """

    def __init__(self, head: Linear, vocab_size: int, group: ProcessGroup) -> None:
        super().__init__(0, 0)
        self.weight, self.initial = head.weight, head.initial
        self._vocab_size, self._group = vocab_size, group

    def forward(self, x_TD: Tensor, rows: slice | None = None) -> Tensor:
        """Return the logits of every token, [T, V]; some rows of the head alone cannot be asked for."""
        assert rows is None
        logits_TN = super().forward(x_TD)
        ranks = self._group.size()
        width = -(-self._vocab_size // ranks)  # all ranks have so many rows but the last ones, which are filled up
        if missing := width - logits_TN.shape[1]:
            logits_TN = F.pad(logits_TN, (0, missing))
        by_rank_WTN = gather_rows(logits_TN, self._group).unflatten(0, (ranks, x_TD.shape[0]))
        return by_rank_WTN.transpose(0, 1).flatten(1)[:, : self._vocab_size]
