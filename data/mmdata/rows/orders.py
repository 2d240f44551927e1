"""`Orders`: shuffled orders of documents, an order an epoch, kept on disk where the documents are many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdata.corpus.array_cache import ArrayCache, Entry, Tick
from mmdata.corpus.documents import Documents
from mmdata.hashing import mix_array, salt_of, shuffled
from mmdata.rows.cache import cached

LARGE = 1 << 16  # documents from which on an order is kept on disk; below, it takes milliseconds to make
PART = 1 << 26  # documents that are sorted at a time, which bounds the memory: about 50 bytes each
_VERSION = 1  # of the shuffle; raise it if ever an order changes


class Orders:
    """Orders of the documents of a stream, by epoch, each made by one process and mapped by all others.

    Args:
        documents: to be shuffled.
        seed: of the shuffle.
        cache: where orders are kept; None, or documents without a key, or few documents: in memory.
    """

    def __init__(self, documents: Documents, seed: int, cache: ArrayCache | None) -> None:
        self._documents, self._seed = documents, seed
        self.cache = cache if documents.key is not None and len(documents) >= LARGE else None
        self._places: dict[int, np.ndarray] = {}
        self._bounds: dict[int, np.ndarray] = {}

    def key(self, **more: Any) -> Mapping[str, Any]:
        """Key of something that follows from the documents, the seed and `more`."""
        return {"documents": self._documents.key, "seed": self._seed, "version": _VERSION, **more}

    def places(self, epoch: int) -> np.ndarray:
        """Positions among the documents in the epoch's order, uint32[n] or int64[n]."""
        return cached(self._places, epoch, self._make_places, keep=2)

    def bounds(self, epoch: int) -> np.ndarray:
        """Where each document of an epoch's order begins and the last ends, in tokens: int64[n + 1]."""
        return cached(self._bounds, epoch, self._make_bounds, keep=2)

    def _make_places(self, epoch: int) -> np.ndarray:
        def make(tick: Tick) -> Entry:
            return Entry({"places": shuffled_places(len(self._documents), (self._seed, epoch, 0), PART, tick)})

        if self.cache is None:
            return make(lambda done: None).arrays["places"]
        what = f"the order of {len(self._documents):,} documents in epoch {epoch}"
        return self.cache.get("order", self.key(epoch=epoch), make, what).arrays["places"]

    def _make_bounds(self, epoch: int) -> np.ndarray:
        def make(tick: Tick) -> Entry:
            places = self.places(epoch)
            bounds = np.zeros(len(places) + 1, dtype=np.int64)
            np.cumsum(self._documents.lengths[places], out=bounds[1:])
            return Entry({"bounds": bounds})

        if self.cache is None:
            return make(lambda done: None).arrays["bounds"]
        self.places(epoch)  # by a lock of its own
        what = f"where {len(self._documents):,} documents lie in epoch {epoch}"
        return self.cache.get("bounds", self.key(epoch=epoch), make, what).arrays["bounds"]


def shuffled_places(n: int, salt_parts: tuple[int, ...], part: int, tick: Tick) -> np.ndarray:
    """`shuffled(np.arange(n), *salt_parts)` as uint32[n] (int64 from 2^32 on), in memory for about `part` elements.

    Above `part` elements, those whose keys lie in one slice of all keys are sorted at a time; the slices are in order.
    """
    kind = np.uint32 if n <= 1 << 32 else np.int64
    if n <= part:
        return shuffled(np.arange(n), *salt_parts).astype(kind)
    salt, slices = np.uint64(salt_of(*salt_parts)), -(-n // part)
    edges = [(1 << 64) * k // slices for k in range(slices)]
    result, filled = np.empty(n, dtype=kind), 0
    for k, edge in enumerate(edges):
        last = np.uint64((edges[k + 1] if k + 1 < slices else 1 << 64) - 1)
        found = [_keys_between(start, min(start + part, n), salt, np.uint64(edge), last) for start in range(0, n, part)]
        ids, keys = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        result[filled : filled + len(ids)] = ids[np.argsort(keys, kind="stable")]
        filled += len(ids)
        tick((k + 1) / slices)
    return result


def _keys_between(
    start: int, stop: int, salt: np.uint64, first: np.uint64, last: np.uint64
) -> tuple[np.ndarray, np.ndarray]:
    """Of start..stop-1, those whose key lies in first..last, int64, and their keys, uint64."""
    ids = np.arange(start, stop)
    keys = mix_array(mix_array(ids) ^ salt)
    mine = (keys >= first) & (keys <= last)
    return ids[mine], keys[mine]
