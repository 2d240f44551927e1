"""A packed row cut into chunks that ranks share: which tokens lie here, and what of their documents lies elsewhere.

Everything is arithmetic on the host, done from the documents' lengths before the row goes to the device, and the same
on every rank. Nothing of a document is padded or moved: a chunk begins and ends wherever its tokens do.

Legend: T tokens of the row, M chunks of C = T / M tokens, R ranks, N = M / R chunks of a rank, S = N C tokens here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmkernels.lightning import ChunkPlan
from mmtrain.model.packed_seq import Packing, offsets_of, to_device
from mmtrain.parallel.context.ownership import TABLES, Table, causal_work, imbalance


@dataclass(frozen=True)
class RowShard:
    """One rank's chunks of a packed row, and how documents run from chunk to chunk.

    Attributes:
        table: chunks of each rank.
        rank: whose chunks lie here.
        chunk_tokens: C.
        head_M: tokens at the beginning of each chunk whose document began in an earlier chunk; int64, as the others.
        tail_M: tokens at the end of each chunk whose document goes on in the next chunk.
        start_M: where in the row the document of a chunk's first token begins.
        piece_lengths: of the parts of documents that lie in this rank's chunks, in order; every chunk begins one.
        balance: causal pairs of the busiest rank over the mean over ranks.
    """

    table: Table
    rank: int
    chunk_tokens: int
    head_M: np.ndarray
    tail_M: np.ndarray
    start_M: np.ndarray
    piece_lengths: tuple[int, ...]
    balance: float = field(compare=False)

    @staticmethod
    def plan(lengths: tuple[int, ...], chunks: int, ranks: int, rank: int, planner: str = "balanced") -> RowShard:
        """Share out a row of documents of these lengths.

        Args:
            lengths: tokens of each document, 0 allowed; M divides their sum.
            chunks: M, a multiple of `ranks`.
            ranks: R.
            rank: this one.
            planner: a name in :data:`~mmtrain.parallel.context.ownership.TABLES`.
        """
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        work_M = causal_work(cu_seqlens, chunks)
        return RowShard.of_table(cu_seqlens, TABLES[planner](work_M, ranks), rank, work_M)

    @staticmethod
    def of_table(cu_seqlens: np.ndarray, table: Table, rank: int, work_M: np.ndarray | None = None) -> RowShard:
        """Lay a row out by a given table; `cu_seqlens` int64 [documents + 1]."""
        chunks, tokens = sum(map(len, table)), int(cu_seqlens[-1])
        size = tokens // chunks
        edges = np.arange(chunks, dtype=np.int64) * size
        document = np.searchsorted(cu_seqlens, edges, side="right") - 1  # the last that begins there: one with tokens
        start_M = cu_seqlens[document]
        head_M = np.where(start_M < edges, np.minimum(cu_seqlens[document + 1] - edges, size), 0)
        goes_on = np.append(head_M[1:] > 0, False)
        tail_M = np.where(goes_on, np.minimum(edges + size - np.append(start_M[1:], 0), size), 0)
        bounds = np.union1d(cu_seqlens, np.append(edges, tokens))
        owner_M = np.empty(chunks, dtype=np.int64)
        for r, mine in enumerate(table):
            owner_M[list(mine)] = r
        pieces = np.diff(bounds)[owner_M[bounds[:-1] // size] == rank] if tokens else np.empty(0, np.int64)
        work_M = causal_work(cu_seqlens, chunks) if work_M is None else work_M
        return RowShard(table, rank, size, head_M, tail_M, start_M, tuple(pieces.tolist()), imbalance(work_M, table))

    @property
    def chunks(self) -> tuple[int, ...]:
        """Numbers of this rank's chunks, ascending: the order of its tokens."""
        return self.table[self.rank]

    @property
    def num_chunks(self) -> int:
        """M."""
        return len(self.head_M)

    @property
    def num_tokens(self) -> int:
        """S, the tokens of this rank."""
        return len(self.chunks) * self.chunk_tokens

    @cached_property
    def through_M(self) -> np.ndarray:
        """Whether a document runs through each chunk, from before it to behind it; bool."""
        return (self.head_M == self.chunk_tokens) & (self.tail_M == self.chunk_tokens)

    @cached_property
    def place_M(self) -> np.ndarray:
        """Place of each chunk where the chunks of all ranks are laid one rank after another (as they are gathered)."""
        place_M = np.empty(self.num_chunks, dtype=np.int64)
        place_M[np.concatenate(self.table)] = np.arange(self.num_chunks)
        return place_M

    def places(self) -> Tensor:
        """Places of this rank's tokens in the row, int64 [S] on the host."""
        starts_N = torch.tensor(self.chunks, dtype=torch.int64) * self.chunk_tokens
        return (starts_N[:, None] + torch.arange(self.chunk_tokens)).flatten()

    @property
    def crosses(self) -> bool:
        """Whether any document lies in more than one chunk."""
        return bool((self.head_M > 0).any())


@dataclass(frozen=True)
class ContextPacking(Packing):
    """The part of a packed row that lies on this rank: pieces of documents, which each begin anew in every chunk.

    Offsets, lengths and positions are those of the S tokens here; `real` is that of the whole row.

    Attributes:
        whole: the row before it was cut.
        shard: how it was cut.
        index_S: int64 [S], places of this rank's tokens in the row, on the device.
        place_M: int64 [M], `RowShard.place_M` on the device.
        chunk_plan: how states go from chunk to chunk, for all lightning layers.
    """

    whole: Packing | None = None
    shard: RowShard | None = None
    index_S: Tensor | None = None
    place_M: Tensor | None = None
    chunk_plan: ChunkPlan | None = None

    @property
    def real_lengths(self) -> tuple[int, ...]:
        """Tokens of each document of the whole row that is not padding."""
        return self.whole.real_lengths

    @property
    def row_tokens(self) -> int:
        """T, the tokens of the whole row."""
        return self.whole.row_tokens

    @property
    def document_T(self) -> Tensor:
        """Number of the document of each token here, int64 [S], among those of the whole row."""
        return self.whole.document_T.index_select(0, self.index_S)

    @property
    def num_documents(self) -> int:
        """Documents of the whole row."""
        return self.whole.num_documents

    @property
    def speaks_for_rows(self) -> bool:
        """Whether this rank is the first of those that share the row."""
        return self.shard.rank == 0

    @property
    def balance(self) -> float:
        """Softmax work of the busiest rank over the mean over ranks."""
        return self.shard.balance

    @staticmethod
    def cut(whole: Packing, shard: RowShard) -> ContextPacking:
        """The part of a row that `shard` says; nothing waits for the device."""
        device = whole.position_ids_T.device
        chunk_N = to_device(torch.tensor(shard.chunks, dtype=torch.int64), device)
        index_S = (chunk_N[:, None] * shard.chunk_tokens + torch.arange(shard.chunk_tokens, device=device)).flatten()
        return ContextPacking(
            to_device(offsets_of(shard.piece_lengths), device),
            whole.position_ids_T.index_select(0, index_S),
            max(shard.piece_lengths, default=0),
            shard.piece_lengths,
            whole.real,
            whole,
            shard,
            index_S,
            to_device(torch.from_numpy(shard.place_M), device),
            ChunkPlan.of(
                shard.chunk_tokens, shard.through_M.tolist(), (shard.head_M > 0).tolist(), shard.chunks,
                shard.place_M.tolist(), device,
            ),
        )  # fmt: skip
