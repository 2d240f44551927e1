"""`ImageStream`: an endless stream of packed rows with images, any of which can be asked for at any time."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.documents import Documents, choose
from mmdata.corpus.fingerprint import digest_of
from mmdata.corpus.protocol import Corpus
from mmdata.errors import DataError
from mmdata.images.corpus import ImageCorpus
from mmdata.images.packing import CUT_VERSION, cut_before_images, fitting
from mmdata.images.row import ImageRow, RowImage
from mmdata.rows.assemble import Row, assemble
from mmdata.rows.mixture import Mixture
from mmdata.rows.packing import BestFitPlan, Plan
from mmdata.rows.pieces import Pieces
from mmdata.rows.stream import RowStream

if TYPE_CHECKING:
    from mmdata.rows.loader import Rows  # it needs torch

_NAMED = 5  # documents that a message names


class ImageStream(RowStream):
    """Endless packed rows of a corpus with images: row i is a pure function of (corpus, documents, seed, seq_len, i).

    Documents are packed as ``best_fit`` does, whole where they fit. One that is longer than a row is cut, but never
    within an image. A document with an image longer than a row is left out, and a preference pair longer than a row.

    Args:
        corpus: with images.
        seq_len: s, tokens in a row.
        seed: of the shuffle, any integer.
        eod_id: fills padding, and labels that do not count.
        documents: as `RowStream` takes them.
        vocab_size: if given, each row's tokens are checked against it.
        cache: as `RowStream` takes it.

    Attributes:
        left_out: int64[m], ids of the documents that no row can hold.

    Raises:
        DataError: an option out of range, or no document that a row can hold.
    """

    corpus: ImageCorpus

    def __init__(
        self,
        corpus: ImageCorpus,
        *,
        seq_len: int,
        seed: int,
        eod_id: int,
        documents: np.ndarray | Documents | None = None,
        vocab_size: int | None = None,
        cache: ArrayCache | None = None,
    ) -> None:
        chosen = documents if isinstance(documents, Documents) else choose(corpus, documents, cache)
        self._given = documents
        fits, self.left_out = fitting(corpus, chosen, seq_len)
        if len(fits) == 0 and len(self.left_out):
            line = left_out_line(corpus, self.left_out, seq_len)
            raise DataError(f"{line}: nothing is left; use a larger seq_len, or prepare it with fewer tiles")
        super().__init__(
            corpus, seq_len=seq_len, seed=seed, packing="best_fit", eod_id=eod_id, documents=fits,
            vocab_size=vocab_size, cache=cache,
        )  # fmt: skip

    def __getitem__(self, i: int) -> ImageRow:
        """Row i, for any i >= 0.

        Raises:
            DataError: it holds a token outside the vocabulary.
            IndexError: i is negative.
        """
        if i < 0:
            raise IndexError(f"row {i}: rows are numbered from 0")
        pieces, second = _apart(self._plan.pieces(i), self.corpus.halves)
        row = assemble(
            [(self.corpus, slice(None))], pieces, seq_len=self.seq_len, eod_id=self.eod_id,
            vocab_size=self.vocab_size, pads=True,
        )  # fmt: skip
        labels, mask = row.labels.copy(), row.loss_mask.copy()
        begins = np.cumsum(pieces.lengths) - pieces.lengths
        offsets = self.corpus.doc_offsets[pieces.documents] + pieces.starts
        real = int(pieces.lengths.sum())
        following = np.arange(real) + np.repeat(offsets - begins, pieces.lengths) + 1  # in the corpus
        mask[:real] &= self.corpus.is_label(np.minimum(following, self.corpus.num_tokens - 1))
        ends = begins[second] - 1  # of the preferred answers: they end their document as the rejected ones do
        labels[ends], mask[ends] = self.eod_id, False
        pairs = np.stack([begins[second - 1], begins[second], begins[second] + pieces.lengths[second]], axis=1)
        return ImageRow(
            **{**_fields(row), "labels": labels, "loss_mask": mask},
            images=tuple(self._images(offsets, pieces.lengths, begins)),
            pairs=pairs.astype(np.int32),
            pair_ids=tuple(f"{self._corpus_id}/{document}" for document in pieces.documents[second].tolist()),
        )

    @cached_property
    def _corpus_id(self) -> str:
        """Short name of what the corpus holds, wherever it lies."""
        return digest_of(self.corpus.fingerprint())[:16]

    def _lay(self, documents: Documents) -> Plan:
        def cut(ids: np.ndarray, lengths: np.ndarray, row: int) -> Pieces:
            return cut_before_images(self.corpus, ids, lengths, row)

        return BestFitPlan(documents, self.seq_len, self.seed, self._cache, cut, CUT_VERSION)

    def _images(self, offsets: np.ndarray, lengths: np.ndarray, begins: np.ndarray) -> list[RowImage]:
        """Images of a row whose pieces are at `offsets` of the corpus, of `lengths`, and begin at `begins` of it."""
        found, table = [], self.corpus.table
        for offset, length, begin in zip(offsets.tolist(), lengths.tolist(), begins.tolist(), strict=True):
            for number, first, tokens in self.corpus.images_between(offset, offset + length).tolist():
                file, start, size, width, height, *_ = table.images[number].tolist()
                at = first - offset + begin
                found.append(RowImage(str(table.file(file)), start, size, width, height, at, tokens))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by arguments, as `RowStream` does."""
        return _rebuild, (
            self.corpus, self.seq_len, self.seed, self.eod_id, self._given, self.vocab_size, self._cache,
        )  # fmt: skip


def open_stream(corpus: Corpus, *, packing: str = "concat", **options: Any) -> RowStream:
    """Rows of a corpus: an `ImageStream` where it holds images, whatever the packing of text, else a `RowStream`.

    Args:
        corpus: of any format.
        packing: of a corpus of text.
        options: `seq_len`, `seed`, `eod_id`, `documents`, `vocab_size` and `cache` of both.

    Raises:
        DataError: as they do.
    """
    if isinstance(corpus, ImageCorpus):
        return ImageStream(corpus, **options)
    return RowStream(corpus, packing=packing, **options)


def left_out_lines(stream: Rows) -> list[str]:
    """A line for each corpus of a stream, or of the streams of a `Mixture`, of which documents are left out."""
    streams = stream.streams if isinstance(stream, Mixture) else [stream]
    with_images = [one for one in streams if isinstance(one, ImageStream) and len(one.left_out)]
    return [left_out_line(one.corpus, one.left_out, one.seq_len) for one in with_images]


def left_out_line(corpus: ImageCorpus, left_out: np.ndarray, row: int) -> str:
    """One line that counts the documents that no row of `row` tokens can hold, and names the first."""
    names = ", ".join(str(i) for i in left_out[:_NAMED].tolist())
    more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
    return (
        f"{corpus.prefix}: {len(left_out)} documents are left out, as a row of seq_len {row} is too short for an image "
        f"or a preference pair of theirs (documents {names}{more}; the longest image has "
        f"{int(corpus.places['tokens'].max(initial=0))} tokens)"
    )


def _apart(pieces: Pieces, halves: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Pieces with preference pairs taken apart into their answers, and which pieces are second answers, int64[p]."""
    half = halves[pieces.documents].astype(np.int64)
    is_pair = half > 0
    if not is_pair.any():
        return pieces, np.empty(0, dtype=np.int64)
    counts = 1 + is_pair
    documents, starts = np.repeat(pieces.documents, counts), np.repeat(pieces.starts, counts)
    lengths = np.repeat(pieces.lengths, counts)
    second = (np.cumsum(counts) - 1)[is_pair]
    starts[second] += half[is_pair]
    lengths[second] -= half[is_pair]
    lengths[second - 1] = half[is_pair]
    return Pieces(documents, starts, lengths), second


def _fields(row: Row) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(Row)}


def _rebuild(
    corpus: ImageCorpus,
    seq_len: int,
    seed: int,
    eod_id: int,
    documents: np.ndarray | Documents | None,
    vocab_size: int | None,
    cache: ArrayCache | None,
) -> ImageStream:
    return ImageStream(
        corpus, seq_len=seq_len, seed=seed, eod_id=eod_id, documents=documents, vocab_size=vocab_size, cache=cache
    )
