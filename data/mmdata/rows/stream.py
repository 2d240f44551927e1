"""`RowStream`: an endless stream of packed rows, any of which can be asked for at any time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.documents import Documents, choose
from mmdata.corpus.protocol import Corpus
from mmdata.errors import DataError
from mmdata.rows.packing import BestFitPlan, ConcatPlan, Pieces, Plan

PACKINGS: dict[str, type[ConcatPlan] | type[BestFitPlan]] = {"concat": ConcatPlan, "best_fit": BestFitPlan}


@dataclass(frozen=True)
class Row:
    """One packed row of s tokens.

    Attributes:
        tokens: int32[s].
        labels: int32[s], the next token of the same document, even where that is in a later row.
        loss_mask: bool[s], False at each document's last token and in padding (where labels are EOD).
        position_ids: int32[s], from 0 in each piece of a document, and in the padding.
        cu_seqlens: int32[n + 1], where each piece begins, then s. Padding is a piece of its own, the last.
        real_tokens: tokens before the padding, at least 1; None if rows of this packing never have any.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    real_tokens: int | None = None


class RowStream:
    """Endless packed rows: row i is a pure function of (corpus, documents, seed, packing, seq_len, i).

    Each epoch is shuffled anew.

    Args:
        corpus: of any format.
        seq_len: s, tokens in a row.
        seed: of the shuffle, any integer.
        packing: a name in `PACKINGS`: "concat" (documents end to end) or "best_fit" (whole documents, with padding).
        eod_id: fills padding, and labels that do not count.
        documents: int[n], ids to use; None is all. Empty documents are passed over. Or `Documents`, chosen already.
        vocab_size: if given, each row's tokens are checked against it.
        cache: where what is slow to work out for many documents is kept, unless `documents` are ids.

    Raises:
        DataError: an option out of range, no document with a token in it, or (concat) less than a row of tokens.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        seed: int,
        packing: str = "concat",
        eod_id: int,
        documents: np.ndarray | Documents | None = None,
        vocab_size: int | None = None,
        cache: ArrayCache | None = None,
    ) -> None:
        if packing not in PACKINGS:
            raise DataError(f"packing is {packing!r}: choose one of {', '.join(PACKINGS)}")
        if seq_len < 1:
            raise DataError(f"seq_len is {seq_len}: a row needs at least 1 token")
        self.corpus, self.seq_len, self.seed, self.packing = corpus, seq_len, seed, packing
        self.eod_id, self.vocab_size = eod_id, vocab_size
        self._documents, self._cache = documents, cache
        chosen = documents if isinstance(documents, Documents) else choose(corpus, documents, cache)
        self.num_documents, self.num_tokens = len(chosen), chosen.num_tokens
        if self.num_tokens == 0:
            raise DataError(f"{corpus.prefix} has no document with a token in it: prepare it from other text")
        if packing == "concat" and self.num_tokens < seq_len:
            raise DataError(
                f"{corpus.prefix} has {self.num_tokens} usable tokens, less than one row of seq_len {seq_len}: "
                "use more text, a smaller seq_len, or packing best_fit, which pads"
            )
        self._plan: Plan = PACKINGS[packing](chosen, seq_len, seed, cache)

    def __getitem__(self, i: int) -> Row:
        """Row i, for any i >= 0.

        Raises:
            DataError: it holds a token outside the vocabulary.
            IndexError: i is negative.
        """
        if i < 0:
            raise IndexError(f"row {i}: rows are numbered from 0")
        return self._assemble(self._plan.pieces(i))

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Number of rows that end within an epoch; epoch 0 is the rows from 0 up to this number."""
        return self._plan.rows_per_epoch(epoch)

    def efficiency(self, epoch: int = 0) -> float:
        """Share of real tokens in the rows of an epoch, 1 for concat."""
        return self._plan.efficiency(epoch)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by arguments: a worker process makes its plan anew, and maps what is kept on disk."""
        return _rebuild, (
            self.corpus, self.seq_len, self.seed, self.packing, self.eod_id, self._documents, self.vocab_size,
            self._cache,
        )  # fmt: skip

    def _assemble(self, pieces: Pieces) -> Row:
        s, data = self.seq_len, self.corpus.data
        stops = pieces.starts + pieces.lengths
        closed = stops == self.corpus.doc_lengths[pieces.documents]  # pieces that end their document
        edges = np.zeros(len(stops) + 1, dtype=np.int64)
        np.cumsum(pieces.lengths, out=edges[1:])
        real = int(edges[-1])
        sources = self.corpus.doc_offsets[pieces.documents] + pieces.starts
        steps = np.arange(real)
        index = steps + np.repeat(sources - edges[:-1], pieces.lengths)
        stored = data[index]
        self._check(stored, index)  # before narrowing to int32, which could hide an id out of range
        tokens = np.full(s, self.eod_id, dtype=np.int32)
        tokens[:real] = stored
        labels = np.full(s, self.eod_id, dtype=np.int32)
        labels[: real - 1] = tokens[1:real]
        last = edges[1:] - 1
        labels[last[closed]] = self.eod_id
        if not closed[-1]:  # only a row's last piece can go on, in a later row
            following = index[-1:] + 1
            self._check(data[following], following)
            labels[real - 1] = data[following[0]]
        mask = np.ones(s, dtype=np.bool_)
        mask[last[closed]] = False
        mask[real:] = False
        positions = np.empty(s, dtype=np.int32)
        positions[:real] = steps - np.repeat(edges[:-1], pieces.lengths)
        if real < s:
            positions[real:] = np.arange(s - real)
            edges = np.append(edges, s)
        return Row(tokens, labels, mask, positions, edges.astype(np.int32), real if self._plan.pads else None)

    def _check(self, values: np.ndarray, index: np.ndarray) -> None:
        """Raise the DataError for the first of `values` (from `index` of the corpus) that is out of range."""
        if self.vocab_size is None:
            return
        if values.max() >= self.vocab_size or values.min() < 0:
            bad = int(np.flatnonzero((values >= self.vocab_size) | (values < 0))[0])
            self.corpus.refuse_token(int(index[bad]), self.vocab_size)


def _rebuild(
    corpus: Corpus,
    seq_len: int,
    seed: int,
    packing: str,
    eod_id: int,
    documents: np.ndarray | Documents | None,
    vocab_size: int | None,
    cache: ArrayCache | None,
) -> RowStream:
    return RowStream(
        corpus,
        seq_len=seq_len,
        seed=seed,
        packing=packing,
        eod_id=eod_id,
        documents=documents,
        vocab_size=vocab_size,
        cache=cache,
    )
