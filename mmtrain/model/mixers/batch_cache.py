"""The memory that serving keeps of many documents in one layer: keys in pages, states in slots.

A mixer has a class of its own for it (`MixerSpec.batch_cache`); an engine plans the sizes, shares out pages and slots,
and knows nothing of what lies in them.

Legend: T new tokens and S tokens of all documents of a pass, N documents, P pages that a document has at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmkernels.softmax import Suffixes
from mmtrain.config import ModelConfig
from mmtrain.model.packed_seq import Packing, offsets_of, to_device


@dataclass(frozen=True)
class CacheShape:
    """Sizes of every layer's memory.

    Attributes:
        pages: pages of each layer that keeps something of every token.
        page_tokens: tokens of a page.
        slots: slots of each layer that keeps a state; one document has one.
    """

    pages: int
    page_tokens: int
    slots: int

    @property
    def tokens(self) -> int:
        """Tokens that all pages hold."""
        return self.pages * self.page_tokens


@dataclass(frozen=True)
class DocumentBatch:
    """The documents that a forward pass continues, end to end in one row.

    Attributes:
        queries: new tokens of each, 1 at least.
        keys: tokens of each, the new ones with them; empty where the device alone knows them (:meth:`padded`).
        keys_N: the same on the device, int64; 0 for a place that no document has.
        slots_N: int64 [N], the slot of each; -1 for a place that no document has.
        table_NP: int64 [N, P], the pages of each in order; those past a document's end count for nothing. P is 0 where
            no layer keeps pages.
        shape: of the memory that they are in.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    keys_N: Tensor
    slots_N: Tensor
    table_NP: Tensor
    shape: CacheShape

    @staticmethod
    def of(
        queries: Sequence[int], keys: Sequence[int], slots: Sequence[int], pages: Sequence[Sequence[int]],
        shape: CacheShape, device: torch.device,
    ) -> DocumentBatch:  # fmt: skip
        """Make it from numbers on the host; the host does not wait for the device."""
        table_NP = np.zeros((len(pages), max(map(len, pages), default=0)), dtype=np.int64)
        for row_P, numbers in zip(table_NP, pages, strict=True):
            row_P[: len(numbers)] = np.asarray(numbers, dtype=np.int64)
        slots_N = to_device(torch.tensor(slots, dtype=torch.int64), device)
        keys_N = to_device(torch.tensor(keys, dtype=torch.int64), device)
        table_NP = to_device(torch.from_numpy(table_NP), device)
        return DocumentBatch(tuple(queries), tuple(keys), keys_N, slots_N, table_NP, shape)

    @staticmethod
    def padded(keys_N: Tensor, slots_N: Tensor, table_NP: Tensor, shape: CacheShape) -> DocumentBatch:
        """Make one of documents that get a token each, some of whose places no document has.

        Nothing is read from the device, so that a CUDA graph can be recorded of what is done with it.
        """
        return DocumentBatch((1,) * len(keys_N), (), keys_N, slots_N, table_NP, shape)

    @property
    def single(self) -> bool:
        """Whether every document gets one token."""
        return len(self.queries) == sum(self.queries)

    @cached_property
    def parts(self) -> list[tuple[slice, DocumentBatch]]:
        """The documents in groups, each with its new tokens' rows, of as many tokens as all pages hold at most.

        Documents that share pages have more together: whoever lays out their keys as one tensor does a part at a time.
        """
        parts, first, row = [], 0, 0
        while first < len(self.keys):
            last, tokens = first + 1, self.keys[first]
            while last < len(self.keys) and tokens + self.keys[last] <= self.shape.tokens:
                last, tokens = last + 1, tokens + self.keys[last]
            queries = self.queries[first:last]
            of_part = (
                queries,
                self.keys[first:last],
                *(x[first:last] for x in (self.keys_N, self.slots_N, self.table_NP)),
            )
            parts.append((slice(row, row + sum(queries)), DocumentBatch(*of_part, self.shape)))
            first, row = last, row + sum(queries)
        return [(slice(0, row), self)] if len(parts) == 1 else parts

    @cached_property
    def suffixes(self) -> Suffixes:
        """The documents as the attention of their last tokens takes them."""
        device = self.slots_N.device
        cu_queries, cu_keys = (to_device(offsets_of(lengths), device) for lengths in (self.queries, self.keys))
        return Suffixes(self.queries, self.keys, cu_queries, cu_keys)

    @cached_property
    def packing(self) -> Packing:
        """The new tokens as a row of documents, each with its true positions."""
        if self.single:
            cu_queries = torch.arange(len(self.queries) + 1, dtype=torch.int32, device=self.keys_N.device)
            return Packing(cu_queries, (self.keys_N - 1).clamp(min=0), 1, self.queries)
        first_T = self._first_token(self.queries, self.suffixes.cu_queries)
        starts_N = self.keys_N - self.suffixes.cu_queries.diff()
        positions_T = torch.arange(len(first_T), device=first_T.device) - first_T + self._each(starts_N, self.queries)
        return Packing(self.suffixes.cu_queries, positions_T, max(self.queries), self.queries)

    @cached_property
    def write_T(self) -> Tensor:
        """Places of the new tokens in the pages laid end to end, int64 [T]."""
        return self._places(self.packing.position_ids_T, self.queries)

    @cached_property
    def read_S(self) -> Tensor:
        """Places of all tokens of the documents in the pages laid end to end, document by document, int64 [S]."""
        first_S = self._first_token(self.keys, self.suffixes.cu_keys)
        return self._places(torch.arange(len(first_S), device=first_S.device) - first_S, self.keys)

    def _first_token(self, lengths: tuple[int, ...], cu: Tensor) -> Tensor:
        return self._each(cu[:-1].long(), lengths)

    def _each(self, value_N: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """A document's value for each of its tokens."""
        counts_N = self.suffixes.cu_queries if lengths is self.queries else self.suffixes.cu_keys
        return torch.repeat_interleave(value_N, counts_N.diff().long(), output_size=sum(lengths))

    def _places(self, positions: Tensor, lengths: tuple[int, ...]) -> Tensor:
        documents = self._each(torch.arange(len(lengths), device=positions.device), lengths)
        size = self.shape.page_tokens
        return self.table_NP[documents, positions // size] * size + positions % size


class BatchCache(Protocol):
    """One layer's memory of many documents, made as `cls(config, shape, dtype, device)`.

    Documents whose slots and pages differ do not touch each other's memory, so passes over them may run side by side.

    Attributes:
        takes_padding: whether steps of one token a document leave alone what places without a document would touch,
            and read nothing on the host: decode steps of such layers can be CUDA graphs. Their :meth:`view` takes a
            :class:`~mmtrain.model.mixers.mixed_batch.MixedBatch` too.
    """

    takes_padding: bool

    def __init__(self, config: ModelConfig, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        """Take the memory; `dtype` is that of the model's weights."""

    def begin(self, slot: int) -> None:
        """Make a slot that of a document of which nothing has been read."""

    def copy_slot(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds."""

    def copy_page(self, source: int, target: int) -> None:
        """Let a page hold what another one holds."""

    def view(self, batch: DocumentBatch) -> Any:
        """Return what the mixer takes as its cache to continue these documents."""
