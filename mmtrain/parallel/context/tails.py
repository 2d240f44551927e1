"""Tails of chunks that softmax attention moves between ranks, and where they lie: arithmetic on the host.

A document that goes on from one chunk to the next leaves a *tail* in the first, its tokens there. All queries that it
has in a later chunk see all of its earlier tails: a full rectangle of scores, beside the causal triangle of the chunk
itself. Neighbouring chunks of one rank count as one, so what a rank computes alone is as much as can be.

Everything here follows from the row's documents and the ownership table, which all ranks know, so every rank knows
which tails every other needs, and nothing is asked for.

Legend: M chunks of C tokens of the row, R ranks, S tokens of a rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from mmtrain.parallel.context.row_shard import RowShard


@dataclass(frozen=True)
class Rectangle:
    """Queries of one document on one rank that all see the same earlier tails of it.

    Attributes:
        rows: their place among the rank's S tokens.
        first: the chunk in which the document begins.
        stop: the chunk of the first query. The keys are the tails of chunks `first` to `stop - 1`, whole.
    """

    rows: slice
    first: int
    stop: int


@dataclass(frozen=True)
class Tails:
    """Tails of some chunks, one after another in the order of the row, as they lie in a buffer.

    Attributes:
        chunks: whose tails, ascending.
        offsets: where each begins, then where the last one ends.
    """

    chunks: tuple[int, ...]
    offsets: tuple[int, ...]

    @staticmethod
    def of(chunks: Iterable[int], tail_M: np.ndarray) -> Tails:
        """The tails of these chunks, ascending."""
        chunks = tuple(chunks)
        return Tails(chunks, tuple(accumulate((int(tail_M[c]) for c in chunks), initial=0)))

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return self.offsets[-1]

    def rows(self, chunk: int) -> slice:
        """Place of one chunk's tail."""
        return self.between(chunk, chunk + 1)

    def between(self, first: int, stop: int) -> slice:
        """Place of those tails that belong to chunks `first` to `stop - 1`; empty if there are none."""
        low, high = bisect_left(self.chunks, first), bisect_left(self.chunks, stop)
        return slice(self.offsets[low], self.offsets[high])


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
        rectangles = tuple(tuple(_rectangles(shard, chunks)) for chunks in shard.table)
        return TailPlan(shard, rectangles, _joined_lengths(shard))

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
    def needed(self) -> Tails:
        """All tails that this rank's rectangles need; those of one document follow one another without a gap."""
        return Tails.of(map(int, np.flatnonzero(self.needs_RM[self.rank])), self.shard.tail_M)

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
    def sends(self) -> tuple[tuple[int, int], ...]:
        """Other rank and own chunk of each tail that it needs, ascending."""
        others = (r for r in range(len(self.shard.table)) if r != self.rank)
        return tuple((r, c) for r in others for c in self.shard.chunks if self.needs_RM[r, c])

    @cached_property
    def receives(self) -> tuple[tuple[int, int], ...]:
        """Owner and chunk of each tail of another rank that this one needs, ascending: the mirror of `sends`."""
        owners = (r for r in range(len(self.shard.table)) if r != self.rank)
        return tuple((r, c) for r in owners for c in self.shard.table[r] if self.needs_RM[self.rank, c])

    @cached_property
    def most_received(self) -> int:
        """Tokens that the rank which needs most needs: the same on all ranks."""
        return int((self.needs_RM @ self.shard.tail_M).max())

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


def _rectangles(shard: RowShard, chunks: Sequence[int]) -> Iterable[Rectangle]:
    """Rectangles of a rank with these chunks: one wherever a document comes from a chunk that is no neighbour here."""
    start: int | None = None  # the place in `chunks` where the document came from elsewhere
    for place, chunk in enumerate(chunks):
        goes_on = shard.head_M[chunk] > 0
        neighbour = place > 0 and chunks[place - 1] == chunk - 1
        if goes_on and not neighbour:
            start = place
        elif not goes_on:
            start = None
        through = shard.through_M[chunk] and place + 1 < len(chunks) and chunks[place + 1] == chunk + 1
        if start is not None and not through:
            stop = chunks[start]
            rows = slice(start * shard.chunk_tokens, place * shard.chunk_tokens + int(shard.head_M[chunk]))
            yield Rectangle(rows, int(shard.start_M[chunk]) // shard.chunk_tokens, stop)
            start = None


def _joined_lengths(shard: RowShard) -> tuple[int, ...]:
    """Lengths of the parts of documents on this rank, where neighbouring chunks do not begin a part anew."""
    chunks, ends = shard.chunks, list(accumulate(shard.piece_lengths))
    inside = {
        place * shard.chunk_tokens
        for place in range(1, len(chunks))
        if chunks[place - 1] == chunks[place] - 1 and shard.head_M[chunks[place]] > 0
    }
    bounds = [0, *(end for end in ends if end not in inside)]
    return tuple(high - low for low, high in pairwise(bounds))
