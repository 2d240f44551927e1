"""Pieces of text as token ids, many of them end to end in one array, and put together by their numbers.

Legend: N pieces, T tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np


class Pieces:
    """Pieces of text.

    Args:
        ids_T: int64, of all pieces, end to end.
        lengths_N: int64, tokens of each.

    Attributes:
        lengths_N: the same.
    """

    def __init__(self, ids_T: np.ndarray, lengths_N: np.ndarray) -> None:
        self._ids_T, self.lengths_N = ids_T, lengths_N
        self._first_N = np.cumsum(lengths_N) - lengths_N

    @staticmethod
    def of(texts: Sequence[Sequence[int]]) -> Pieces:
        """Return the pieces of lists of ids."""
        lengths_N = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        return Pieces(np.fromiter(chain.from_iterable(texts), np.int64, int(lengths_N.sum())), lengths_N)

    def __len__(self) -> int:
        return len(self.lengths_N)

    def then(self, *others: Pieces) -> Pieces:
        """Return these pieces and others after them, whose numbers go on from here."""
        every = (self, *others)
        return Pieces(np.concatenate([one._ids_T for one in every]), np.concatenate([one.lengths_N for one in every]))

    def first(self, count: int) -> Pieces:
        """Return the first of them."""
        lengths_N = self.lengths_N[:count]
        return Pieces(self._ids_T[: int(lengths_N.sum())], lengths_N)

    def joined(self, order: np.ndarray) -> np.ndarray:
        """Return the ids of pieces by their numbers, int64, end to end in this order."""
        lengths = self.lengths_N[order]
        before = np.cumsum(lengths) - lengths
        return self._ids_T[np.repeat(self._first_N[order] - before, lengths) + np.arange(int(lengths.sum()))]
