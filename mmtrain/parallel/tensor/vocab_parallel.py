"""Embedding and loss of a vocabulary split over the ranks of a tensor-parallel group, with sequence parallelism.

Outside of these functions each rank holds consecutive T / W of the tokens; inside, its rows of the table for all T.
A rank's rows begin at `first`; ranks may hold different numbers of rows, or none.

Legend: T tokens of the group, W ranks, S = T / W tokens of this rank, D model width, N rows of this rank out of the
vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mmtrain.model.document_score import document_log_probs
from mmtrain.model.loss import linear_cross_entropy, own_rows
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
        local_T, mine_T = own_rows(tokens_T, first, weight_ND.shape[0])
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
    return linear_cross_entropy(x_SD, weight_ND, labels_T, chunk_tokens, VocabParallel(first, group))


class VocabParallelDocuments:
    """The model's `DocumentScoreCall` over rows `first` to `first + N` of a head that a group holds together.

    Args:
        first: vocabulary index of this rank's row 0.
        group: the ranks, in the order of their tokens.
    """

    def __init__(self, first: int, group: ProcessGroup) -> None:
        self._shard = VocabParallel(first, group)

    def __call__(
        self, x_SD: Tensor, weight_ND: Tensor, labels_T: Tensor, document_T: Tensor, documents: int, chunk_tokens: int
    ) -> Tensor:
        """Sum over all T tokens, whose labels and documents are the same on every rank; so is the result."""
        return document_log_probs(x_SD, weight_ND, labels_T, document_T, documents, chunk_tokens, self._shard)


class VocabParallel:
    """This rank's rows of a head that a tensor-parallel group holds together: the model's `VocabShard`.

    Args:
        first: vocabulary index of row 0.
        group: the ranks, in the order of their tokens.
    """

    def __init__(self, first: int, group: ProcessGroup) -> None:
        self.first, self.group = first, group

    def gather(self, x_SD: Tensor) -> Tensor:
        """Hidden states of all ranks' tokens, [T, D]."""
        return gather_rows(x_SD, self.group)

    def scatter_sum(self, dx_TD: Tensor) -> Tensor:
        """This rank's tokens [S, D] of the sum over ranks."""
        return scatter_sum_rows(dx_TD, self.group)

    def reduce(self, stats_3C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest logit, sum of exp(logit - largest) and label's logit, [C] each, over the columns of all ranks.

        One small gather where all-reduces would be two, of a maximum and of sums; every rank adds up in the same order.
        """
        top_WC, sum_WC, label_WC = gather_rows(stats_3C, self.group).view(self.group.size(), 3, -1).unbind(1)
        top_C = top_WC.amax(0)
        return top_C, (sum_WC * (top_WC - top_C).exp()).sum(0), label_WC.sum(0)
