"""A row of documents cut into one run of tokens a rank: arithmetic on the host, the same on every rank.

Nothing is padded: a cut lies wherever it falls in a document.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens of one document on one rank: places `first` to `stop` - 1 of the row."""

    document: int
    first: int
    stop: int


@dataclass(frozen=True)
class RowCut:
    """A row of T tokens over R ranks.

    Attributes:
        lengths: tokens of each document in the row, 1 at least.
        ranks: R, at most T.
    """

    lengths: tuple[int, ...]
    ranks: int

    @cached_property
    def starts(self) -> list[int]:
        """Place of each document's first token in the row, then T."""
        return list(accumulate(self.lengths, initial=0))

    @cached_property
    def edges(self) -> list[int]:
        """Place of each rank's first token, then T; ranks have as many tokens, or one more."""
        tokens = sum(self.lengths)
        return [tokens * rank // self.ranks for rank in range(self.ranks + 1)]

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each rank."""
        return [self.edges[rank + 1] - self.edges[rank] for rank in range(self.ranks)]

    def span(self, rank: int) -> range:
        """Places of a rank's tokens."""
        return range(self.edges[rank], self.edges[rank + 1])

    def pieces(self, rank: int) -> list[Piece]:
        """Parts of documents that lie on a rank, in order."""
        span, document, found = self.span(rank), self._document(self.edges[rank]), []
        while self.starts[document] < span.stop:
            first, stop = max(self.starts[document], span.start), min(self.starts[document + 1], span.stop)
            found.append(Piece(document, first, stop))
            document += 1
        return found

    def earlier(self, rank: int) -> range:
        """Ranks before this one that have tokens of its first document; each of them ends with that document."""
        start = self.starts[self._document(self.edges[rank])]
        return range(bisect_right(self.edges, start, hi=self.ranks) - 1, rank)

    @property
    def crosses(self) -> bool:
        """Whether any document lies on several ranks."""
        return any(self.earlier(rank) for rank in range(self.ranks))

    def _document(self, place: int) -> int:
        """The document that has a token of the row."""
        return bisect_right(self.starts, place) - 1
