"""Packed rows and ownership tables that context parallelism is tested with.

Legend: T tokens of a row, M chunks, C tokens of a chunk.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.context.ownership import TABLES, Table, causal_work
from mmtrain.parallel.context.row_shard import ContextPacking, RowShard

CHUNKS, SIZE = 16, 6
TOKENS = CHUNKS * SIZE
ROWS: dict[str, tuple[int, ...]] = {
    "shorter than a chunk": (1, 2, 3, 5, 4, 1, 1, 2, 5, 4, 3, 5) * 2 + (24,),
    "span two ranks": (13, 11, 17, 13, 7, 19, 16),
    "one in the whole row": (96,),
    "all but a token": (1, 94, 1),
    "end at an edge": (6, 12, 30, 24, 24),
    "of length one": (1,) * 30 + (36,) + (1,) * 30,
    "empty ones too": (0, 31, 0, 0, 41, 24, 0),
    "one a chunk": (6,) * 16,
}


def filled(lengths: Sequence[int]) -> tuple[int, ...]:
    """These documents, the last cut or followed by another so that they fill TOKENS."""
    kept, used = [], 0
    for length in lengths:
        kept.append(min(length, TOKENS - used))
        used += kept[-1]
    return (*kept, TOKENS - used) if used < TOKENS else tuple(kept)


def table_of(name: str, lengths: Sequence[int], ranks: int) -> Table:
    """A planner's table, or one drawn at random: "random 3"."""
    if name in TABLES:
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        return TABLES[name](causal_work(cu_seqlens, CHUNKS), ranks)
    order = list(range(CHUNKS))
    random.Random(name).shuffle(order)
    count = CHUNKS // ranks
    return tuple(tuple(sorted(order[rank * count : (rank + 1) * count])) for rank in range(ranks))


def packing_of(lengths: Sequence[int], table: Table, rank: int) -> ContextPacking:
    """A rank's part of a row of TOKENS."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return ContextPacking.cut(Packing.from_lengths(list(lengths)), RowShard.of_table(cu_seqlens, table, rank))


def document_of(lengths: Sequence[int]) -> torch.Tensor:
    """Number of each token's document, int64 [T]."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
