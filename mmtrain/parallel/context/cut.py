"""The cut: micro-batches of whole rows become this rank's part of them, on their way to the model."""

from __future__ import annotations

from mmtrain.config import ParallelConfig
from mmtrain.model.model import ModelInputs
from mmtrain.parallel.context.row_shard import ContextPacking, RowShard


class RowCutter:
    """Cuts micro-batches for one of the ranks that share their rows. Labels were counted before, over whole rows.

    Args:
        ranks: that share a row.
        rank: this one among them.
        config: for the number of chunks and the table.
    """

    def __init__(self, ranks: int, rank: int, config: ParallelConfig) -> None:
        self.ranks, self.rank, self.config = ranks, rank, config

    def __call__(self, batch: ModelInputs) -> ModelInputs:
        """This rank's tokens, labels and pieces of documents; nothing waits for the device."""
        if self.ranks == 1:
            return batch
        chunks = self.ranks * self.config.cp_chunks
        shard = RowShard.plan(batch.packing.lengths, chunks, self.ranks, self.rank, self.config.cp_table)
        packing = ContextPacking.cut(batch.packing, shard)
        tokens_S, labels_S = (x.index_select(0, packing.index_S) for x in (batch.tokens_T, batch.labels_T))
        given = None if batch.given is None else batch.given.cut(shard.places())
        return batch._replace(tokens_T=tokens_S, packing=packing, labels_T=labels_S, given=given)
