"""Tails of chunks that softmax attention moves between ranks, where they lie, and who sees them.

A document that goes on from one chunk to the next leaves a *tail* in the first, its tokens there. All queries that it
has in a later chunk see all of its earlier tails: a full rectangle of scores, beside the causal triangle of the chunk
itself. Neighbouring chunks of one rank count as one, so what a rank computes alone is as much as can be.

Legend: M chunks of C tokens of the row, S tokens of a rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


def rectangles_of(shard: RowShard, chunks: Sequence[int]) -> Iterable[Rectangle]:
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


def joined_lengths(shard: RowShard) -> tuple[int, ...]:
    """Lengths of the parts of documents on this rank, where neighbouring chunks do not begin a part anew."""
    chunks, ends = shard.chunks, list(accumulate(shard.piece_lengths))
    inside = {
        place * shard.chunk_tokens
        for place in range(1, len(chunks))
        if chunks[place - 1] == chunks[place] - 1 and shard.head_M[chunks[place]] > 0
    }
    bounds = [0, *(end for end in ends if end not in inside)]
    return tuple(high - low for low, high in pairwise(bounds))
