"""The cut: micro-batches of whole rows become this rank's part of them, on their way to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmtrain.config import ParallelConfig
from mmtrain.model.model import ModelInputs
from mmtrain.parallel.context.row_shard import ContextPacking, RowShard


@dataclass(frozen=True)
class SequenceSlice:
    """This rank's slice of the tokens between mixers, where sequence parallelism shares them out.

    Attributes:
        ranks: of tensor parallelism.
        rank: this one among them.
    """

    ranks: int = 1
    rank: int = 0

    def cut(self, batch: ModelInputs) -> ModelInputs:
        """What is given in place of ids, for the embeddings that come out of the table on this rank: of its slice."""
        if self.ranks == 1 or batch.given is None:
            return batch
        size = batch.tokens_T.shape[0] // self.ranks
        return batch._replace(given=batch.given.cut(torch.arange(self.rank * size, (self.rank + 1) * size)))


class RowCutter:
    """Cuts micro-batches for one of the ranks that share their rows. Labels were counted before, over whole rows.

    Args:
        ranks: that share a row.
        rank: this one among them.
        config: for the number of chunks and the table.
        slice: of those tokens, by tensor parallelism: ids, labels and packing are of all of them.
    """

    def __init__(self, ranks: int, rank: int, config: ParallelConfig, slice: SequenceSlice = SequenceSlice()) -> None:
        self.ranks, self.rank, self.config, self.slice = ranks, rank, config, slice

    def __call__(self, batch: ModelInputs) -> ModelInputs:
        """This rank's tokens, labels and pieces of documents; nothing waits for the device."""
        return self.slice.cut(batch if self.ranks == 1 else self._chunks(batch))

    def _chunks(self, batch: ModelInputs) -> ModelInputs:
        chunks = self.ranks * self.config.cp_chunks
        shard = RowShard.plan(batch.packing.lengths, chunks, self.ranks, self.rank, self.config.cp_table)
        packing = ContextPacking.cut(batch.packing, shard)
        tokens_S, labels_S = (x.index_select(0, packing.index_S) for x in (batch.tokens_T, batch.labels_T))
        given = None if batch.given is None else batch.given.cut(shard.places())
        return batch._replace(tokens_T=tokens_S, packing=packing, labels_T=labels_S, given=given)
