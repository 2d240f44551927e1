"""Which rank sends which tails of a packed row to which: arithmetic on the host, alike on all ranks.

Everything follows from the row's documents and the ownership table, which all ranks know, so every rank knows which
tails every other needs, and nothing is asked for.

Legend: M chunks of C tokens of the row, R ranks, S tokens of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmtrain.parallel.context.row_shard import RowShard
from mmtrain.parallel.context.tails import Rectangle, Tails, joined_lengths, rectangles_of


@dataclass(frozen=True)
class TailPlan:
    """Everything that one rank has to know of a row to compute softmax attention with the others.

    Attributes:
        shard: the row, as it is shared out.
        rectangles_R: every rank's rectangles, in the order of its tokens.
        lengths: of the parts of documents here, neighbouring chunks joined; they are S tokens.
    """

    shard: RowShard
    rectangles_R: tuple[tuple[Rectangle, ...], ...]
    lengths: tuple[int, ...]

    @staticmethod
    def of(shard: RowShard) -> TailPlan:
        """Plan a row."""
        rectangles = tuple(tuple(rectangles_of(shard, chunks)) for chunks in shard.table)
        return TailPlan(shard, rectangles, joined_lengths(shard))

    @property
    def rank(self) -> int:
        """This rank."""
        return self.shard.rank

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """Those of this rank."""
        return self.rectangles_R[self.rank]

    @cached_property
    def needs_RM(self) -> np.ndarray:
        """Whether a rank's rectangles need a chunk's tail; its own chunks too. Bool."""
        needs_RM = np.zeros((len(self.shard.table), self.shard.num_chunks), dtype=bool)
        for needs_M, rectangles in zip(needs_RM, self.rectangles_R, strict=True):
            for rectangle in rectangles:
                needs_M[rectangle.first : rectangle.stop] = True
        return needs_RM

    @property
    def crosses(self) -> bool:
        """Whether any rank has a rectangle: the same on all."""
        return bool(self.needs_RM.any())

    @cached_property
    def needed_R(self) -> tuple[Tails, ...]:
        """All tails that each rank's rectangles need; those of one document follow one another without a gap."""
        return tuple(Tails.of(map(int, np.flatnonzero(needs_M)), self.shard.tail_M) for needs_M in self.needs_RM)

    @property
    def needed(self) -> Tails:
        """Those of this rank."""
        return self.needed_R[self.rank]

    @cached_property
    def shared_R(self) -> tuple[Tails, ...]:
        """Tails of each rank's chunks that any rank needs; those of one document follow one another."""
        wanted_M = self.needs_RM.any(axis=0)
        return tuple(Tails.of((c for c in chunks if wanted_M[c]), self.shard.tail_M) for chunks in self.shard.table)

    @property
    def shared(self) -> Tails:
        """Those of this rank."""
        return self.shared_R[self.rank]

    def tail_rows(self, chunk: int) -> slice:
        """Place of the tail of one of this rank's chunks among its S tokens."""
        end = (self.shard.chunks.index(chunk) + 1) * self.shard.chunk_tokens
        return slice(end - int(self.shard.tail_M[chunk]), end)

    @cached_property
    def sends(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Other rank and own chunks of each message of tails, ascending."""
        return tuple((r, run) for r in self._others for run in self._runs(self.rank, r))

    @cached_property
    def receives(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Owner and chunks of each message of tails that this rank needs, ascending: the mirror of `sends`."""
        return tuple((r, run) for r in self._others for run in self._runs(r, self.rank))

    @property
    def _others(self) -> list[int]:
        return [r for r in range(len(self.shard.table)) if r != self.rank]

    def _runs(self, owner: int, needer: int) -> list[tuple[int, ...]]:
        """Chunks whose tails one rank sends another; those that lie one after another in both's buffers together."""
        shared, needed = self.shared_R[owner].chunks, self.needed_R[needer].chunks
        runs: list[tuple[int, ...]] = []
        for chunk in shared:
            if not self.needs_RM[needer, chunk]:
                continue
            places = shared.index(chunk), needed.index(chunk)
            if runs and places == (shared.index(runs[-1][-1]) + 1, needed.index(runs[-1][-1]) + 1):
                runs[-1] += (chunk,)
            else:
                runs.append((chunk,))
        return runs

    @cached_property
    def most_received(self) -> int:
        """Tokens that the rank which needs most needs: the same on all ranks."""
        return max(tails.tokens for tails in self.needed_R)

    @cached_property
    def most_shared(self) -> int:
        """Tokens that the rank which shares most shares: the same on all ranks."""
        return max(tails.tokens for tails in self.shared_R)

    @cached_property
    def most_returned(self) -> int:
        """Tokens whose gradients come back to the rank to which most do, once for each rank that needs them."""
        needed_M = self.needs_RM.sum(axis=0) * self.shard.tail_M
        return max(int(needed_M[list(chunks)].sum()) for chunks in self.shard.table)

    @cached_property
    def most_keys(self) -> int:
        """Keys of the rank which has most, if those of each part of a document here lie together, copies included."""
        ends_M = np.concatenate([[0], np.cumsum(self.shard.tail_M)])
        copied = [sum(int(ends_M[x.stop] - ends_M[x.first]) for x in found) for found in self.rectangles_R]
        return self.shard.num_tokens + max(copied)

    @cached_property
    def single(self) -> bool:
        """Whether no rank needs a tail for two of its rectangles: the same on all ranks."""
        return all(
            sum(x.stop - x.first for x in found) == int(needs_M.sum())
            for found, needs_M in zip(self.rectangles_R, self.needs_RM, strict=True)
        )

    @cached_property
    def hops_R(self) -> tuple[int, ...]:
        """How far each rank's tails travel around the ring, 1 being the next rank, until nobody further needs them."""
        ranks = len(self.shard.table)
        return tuple(
            max((h for h in range(1, ranks) if self.needs_RM[(source + h) % ranks, list(chunks)].any()), default=0)
            for source, chunks in enumerate(self.shard.table)
        )

    @property
    def steps(self) -> int:
        """Steps of the ring after the one in which each rank has its own tails."""
        return max(self.hops_R)
