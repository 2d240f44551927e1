"""The documents that a pass continues, as one rank under context parallelism sees them.

Legend: T tokens of the row, N documents, W tokens of the row whose keys lie on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmkernels.softmax import Suffixes
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.context.row_cut import Piece, RowCut
from mmtrain.infer.serving.page_owner import PageOwner
from mmtrain.model.mixers.batch_cache import CacheShape, DocumentBatch
from mmtrain.model.packed_seq import Packing, offsets_of, to_device


@dataclass(frozen=True)
class ContextBatch:
    """A row of documents of which all ranks know all, each rank computes `span`, and each keeps keys of its own.

    Attributes:
        row: the documents, with slots and without pages.
        stored: those of them that have earlier keys on this rank, with the pages and the number of these; None where
            none has. Their `queries` are 1 each, whatever the row has. In a row of single tokens all documents are
            there if any is, some perhaps with 0 keys.
        stored_documents: their numbers in the row.
        written_W: int64, places in the row of the tokens whose keys this rank keeps.
        places_W: int64, where in its pages, laid end to end.
        cut: how the ranks share the row; over one rank where each computes all of it.
        rank: this one of all.
    """

    row: DocumentBatch
    stored: DocumentBatch | None
    stored_documents: tuple[int, ...]
    written_W: Tensor
    places_W: Tensor
    cut: RowCut
    rank: int

    @staticmethod
    def of(
        queries: Sequence[int], keys: Sequence[int], slots: Sequence[int], pages: Sequence[Sequence[int]],
        shape: CacheShape, device: torch.device, context: ContextParallel,
    ) -> ContextBatch:  # fmt: skip
        """Make it from numbers on the host, as `DocumentBatch.of`; `pages` are numbered over all ranks."""
        owner = PageOwner(context.ranks, context.rank, shape.page_tokens)
        row = DocumentBatch.of(queries, keys, slots, [()] * len(slots), shape, device)
        before = [k - q for k, q in zip(keys, queries, strict=True)]
        found = [owner.stored(*one) for one in zip(pages, before, strict=True)]
        documents = tuple(n for n, (_, tokens) in enumerate(found) if tokens)
        stored = None
        if documents:
            documents = tuple(range(len(found))) if row.single else documents
            here, tokens = zip(*(found[n] for n in documents), strict=True)
            stored = DocumentBatch.of([1] * len(here), tokens, [slots[n] for n in documents], here, shape, device)
        first_N = np.cumsum([0, *queries])[:-1]
        new = [owner.written(*one) for one in zip(pages, before, queries, strict=True)]
        written, places = (
            to_device(torch.from_numpy(np.concatenate(parts)), device)
            for parts in ([first + here for first, (here, _) in zip(first_N, new, strict=True)], [at for _, at in new])
        )
        shared = not row.single and sum(queries) >= max(context.ranks, context.cut_tokens)
        cut = RowCut(row.queries, context.ranks if shared else 1)
        return ContextBatch(row, stored, documents, written, places, cut, context.rank)

    @property
    def continues(self) -> bool:
        """Whether any document has earlier tokens, on whatever rank."""
        return self.row.queries != self.row.keys

    @property
    def shared(self) -> bool:
        """Whether each rank computes a part of the row."""
        return self.cut.ranks > 1

    @property
    def part(self) -> int:
        """Which part of `cut` this rank computes."""
        return self.rank if self.shared else 0

    @property
    def span(self) -> range:
        """Places in the row of the tokens that this rank computes."""
        return self.cut.span(self.part)

    @property
    def answers(self) -> range:
        """Places of those for which this rank gives the results; each token has one rank that does."""
        return self.span if self.rank == self.part else range(0)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Parts of documents in `span`."""
        return self.cut.pieces(self.part)

    @cached_property
    def packing(self) -> Packing:
        """The tokens of `span` as a row of documents, each with its true positions."""
        whole = self.row.packing
        if not self.shared:
            return whole
        lengths = [piece.stop - piece.first for piece in self.pieces]
        cu_seqlens = to_device(offsets_of(lengths), whole.cu_seqlens.device)
        positions = whole.position_ids_T[self.span.start : self.span.stop]
        return Packing(cu_seqlens, positions, max(lengths), tuple(lengths))

    @cached_property
    def seen(self) -> range:
        """Places of the row's tokens that those of `span` attend to."""
        return range(self._start(self.pieces[0]), self.span.stop)

    @cached_property
    def suffixes(self) -> Suffixes:
        """The tokens of `span` as the last ones of their documents among those that are seen."""
        queries = [piece.stop - piece.first for piece in self.pieces]
        keys = [piece.stop - self._start(piece) for piece in self.pieces]
        device = self.row.slots_N.device
        cu_queries, cu_keys = (to_device(offsets_of(lengths), device) for lengths in (queries, keys))
        return Suffixes(tuple(queries), tuple(keys), cu_queries, cu_keys)

    @cached_property
    def stored_rows(self) -> list[slice]:
        """Places of the row's tokens of each document that has earlier keys here."""
        starts = self.cut.starts
        return [slice(starts[n], starts[n + 1]) for n in self.stored_documents]

    @cached_property
    def stored_last_N(self) -> Tensor:
        """Place of the last earlier key here of each such document, int64; anywhere for one without any."""
        assert self.stored is not None
        last_N, size = (self.stored.keys_N - 1).clamp(min=0), self.stored.shape.page_tokens
        return self.stored.table_NP.gather(1, last_N[:, None] // size)[:, 0] * size + last_N % size

    @cached_property
    def distances_P1(self) -> Tensor:
        """Tokens between what enters this rank's first document and its first token here, float64 [P, 1].

        First those from the document's beginning in the row on, then those behind each earlier rank that has some of
        it; P is 1 more than these.
        """
        edges, here = self.cut.edges, self.span.start
        ends = [self._start(self.pieces[0]), *(edges[rank + 1] for rank in self.cut.earlier(self.part))]
        distances = torch.tensor([here - end for end in ends], dtype=torch.float64)
        return to_device(distances[:, None], self.row.slots_N.device)

    def _start(self, piece: Piece) -> int:
        """Place of the first token in the row of a piece's document."""
        return self.cut.starts[piece.document]
