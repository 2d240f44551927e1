"""`RowStream`: an endless stream of packed rows, any of which can be asked for at any time."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.documents import Documents, choose
from mmdata.corpus.protocol import Corpus
from mmdata.errors import DataError
from mmdata.rows.assemble import Row, assemble
from mmdata.rows.packing import BestFitPlan, ConcatPlan, Plan

PACKINGS: dict[str, type[ConcatPlan] | type[BestFitPlan]] = {"concat": ConcatPlan, "best_fit": BestFitPlan}


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
        self._plan: Plan = self._lay(chosen)

    def __getitem__(self, i: int) -> Row:
        """Row i, for any i >= 0.

        Raises:
            DataError: it holds a token outside the vocabulary.
            IndexError: i is negative.
        """
        if i < 0:
            raise IndexError(f"row {i}: rows are numbered from 0")
        pieces = self._plan.pieces(i)
        return assemble(
            [(self.corpus, slice(None))], pieces, seq_len=self.seq_len, eod_id=self.eod_id,
            vocab_size=self.vocab_size, pads=self._plan.pads,
        )  # fmt: skip

    @property
    def pads(self) -> bool:
        """Whether rows may end in padding."""
        return self._plan.pads

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Number of rows that end within an epoch; epoch 0 is the rows from 0 up to this number."""
        return self._plan.rows_per_epoch(epoch)

    def efficiency(self, epoch: int = 0) -> float:
        """Share of real tokens in the rows of an epoch, 1 for concat."""
        return self._plan.efficiency(epoch)

    def _lay(self, documents: Documents) -> Plan:
        """Plan of the rows, by the packing's name."""
        return PACKINGS[self.packing](documents, self.seq_len, self.seed, self._cache)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by arguments: a worker process makes its plan anew, and maps what is kept on disk."""
        return _rebuild, (
            self.corpus, self.seq_len, self.seed, self.packing, self.eod_id, self._documents, self.vocab_size,
            self._cache,
        )  # fmt: skip


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
