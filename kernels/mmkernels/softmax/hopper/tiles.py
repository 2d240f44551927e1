"""Lists of tiles for Hopper's kernels: which queries or keys of which document, most work first.

All is arithmetic on the host, from lengths that it knows. The mask of every kind of block is one rule: the query of
number i in its tensor sees the keys of its document up to number ``i + shift``, counted from the document's first key.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

BLOCK_QUERIES = 64
"""Queries of a warpgroup, and of a step in backward."""
BLOCK_KEYS = 128


@dataclass(frozen=True)
class Documents:
    """Documents whose queries lie one after another in one tensor, and whose keys do in another.

    Attributes:
        queries: of each document.
        keys: of each; with a causal mask at least its queries, which are its last tokens.
        causal: whether a query sees keys up to its own token, or all.
        device: of the lists.
        left_out: documents whose tiles are left out, by number.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool
    device: torch.device
    left_out: frozenset[int] = frozenset()

    def query_tiles(self, heads: int) -> Tensor:
        """Tiles of 64 queries, if units have two heads, or of 128, int32 [N, 5], on the device.

        Fields: first query, end of the document's queries, its first key, shift, its keys.
        """
        return self._pairs if heads == 2 else self._singles

    def key_tiles(self) -> Tensor:
        """Tiles of 128 keys, int32 [N, 6], on the device.

        Fields: first key, end of the document's keys, its first key, first and end of its queries, shift.
        """
        return self._keys

    @cached_property
    def _pairs(self) -> Tensor:
        return self._upload(query_tiles(self.queries, self.keys, self.causal, BLOCK_QUERIES, self.left_out))

    @cached_property
    def _singles(self) -> Tensor:
        return self._upload(query_tiles(self.queries, self.keys, self.causal, 2 * BLOCK_QUERIES, self.left_out))

    @cached_property
    def _keys(self) -> Tensor:
        return self._upload(key_tiles(self.queries, self.keys, self.causal, self.left_out))

    def _upload(self, tiles: np.ndarray) -> Tensor:
        found = torch.from_numpy(tiles)
        # From pinned memory: the host does not wait for what the device has been asked before.
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found


def query_tiles(
    queries: Sequence[int], keys: Sequence[int], causal: bool, rows: int, left_out: Collection[int] = ()
) -> np.ndarray:
    """Those of :meth:`Documents.query_tiles`, of `rows` queries."""
    document = _cut(queries, rows, left_out)
    query, key, queries_N, keys_N = _documents(queries, keys, document)
    first, shift, end = query + _places(document) * rows, _shift(query, queries_N, keys_N, causal), query + queries_N
    seen = np.minimum(np.minimum(first + rows, end) + shift, keys_N)
    return _most_first([first, end, key, shift, keys_N], -(-seen // BLOCK_KEYS))


def key_tiles(queries: Sequence[int], keys: Sequence[int], causal: bool, left_out: Collection[int] = ()) -> np.ndarray:
    """Those of :meth:`Documents.key_tiles`."""
    document = _cut(keys, BLOCK_KEYS, left_out)
    query, key, queries_N, keys_N = _documents(queries, keys, document)
    at = _places(document) * BLOCK_KEYS
    shift, end = _shift(query, queries_N, keys_N, causal), query + queries_N
    seeing = end - np.maximum(query, at - shift)
    return _most_first([key + at, key + keys_N, key, query, end, shift], -(-seeing // BLOCK_QUERIES))


def _cut(lengths: Sequence[int], rows: int, left_out: Collection[int]) -> np.ndarray:
    """The document of each tile."""
    tiles = -(-np.asarray(lengths, dtype=np.int64) // rows)
    tiles[list(left_out)] = 0
    return np.repeat(np.arange(len(lengths)), tiles)


def _places(document: np.ndarray) -> np.ndarray:
    """Of each tile its number within its document."""
    return np.arange(len(document)) - np.searchsorted(document, document)


def _documents(queries: Sequence[int], keys: Sequence[int], document: np.ndarray) -> list[np.ndarray]:
    """First query and key, queries and keys of each tile's document."""
    lengths = np.asarray([queries, keys], dtype=np.int64)
    return [x[document] for x in (*(np.cumsum(lengths, axis=1) - lengths), *lengths)]


def _shift(query: np.ndarray, queries: np.ndarray, keys: np.ndarray, causal: bool) -> np.ndarray:
    return keys - queries - query if causal else keys


def _most_first(fields: Sequence[np.ndarray], work: np.ndarray) -> np.ndarray:
    return np.stack(fields, axis=1)[np.argsort(-work, kind="stable")].astype(np.int32)
