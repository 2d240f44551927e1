"""`Pieces` of documents, and `TokenRanges`: which pieces hold any stretch of tokens of endlessly shuffled documents."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.documents import Documents
from mmdata.rows.orders import Orders


class Pieces(NamedTuple):
    """Pieces of documents, in order: int64[n] each. A piece is tokens start to start + length of its document."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class TokenRanges:
    """Stretches of an endless sequence of tokens: all documents, shuffled, end to end, epoch after epoch.

    Args:
        documents: to be laid end to end.
        seed: of the shuffle; each epoch has an order of its own.
        cache: where orders of many documents are kept.
    """

    def __init__(self, documents: Documents, seed: int, cache: ArrayCache | None = None) -> None:
        self._documents, self._total = documents, documents.num_tokens
        self._orders = Orders(documents, seed, cache)

    def pieces(self, start: int, stop: int) -> Pieces:
        """Pieces that hold tokens `start` to `stop` > `start` of the sequence; the first and the last may be cut."""
        parts, position = [], start
        while position < stop:
            epoch, offset = divmod(position, self._total)
            end = min(stop - epoch * self._total, self._total)
            parts.append(self._within(epoch, offset, end))
            position += end - offset
        return parts[0] if len(parts) == 1 else Pieces(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _within(self, epoch: int, start: int, stop: int) -> Pieces:
        """Pieces that hold tokens `start` to `stop` of an epoch."""
        places, bounds = self._orders.places(epoch), self._orders.bounds(epoch)
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        last = int(np.searchsorted(bounds, stop, side="left"))
        cuts = bounds[first : last + 1].copy()
        starts = np.zeros(last - first, dtype=np.int64)
        starts[0] = start - cuts[0]
        cuts[0], cuts[-1] = start, stop
        return Pieces(self._documents.id_of(places[first:last]), starts, np.diff(cuts))
