"""`Documents`: which documents of a corpus are read, and what their rows need to know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.corpus.array_cache import ArrayCache, Entry, read_entry
from mmdata.corpus.fingerprint import digest_of
from mmdata.corpus.protocol import Corpus
from mmdata.errors import DataError

LARGE = 1 << 16  # documents from which on a choice of all that are not empty is kept on disk


@dataclass(frozen=True)
class Documents:
    """Documents of a corpus that have a token in them, in the corpus's order.

    Attributes:
        ids: int64[n]; None stands for 0..n-1.
        lengths: tokens of each document, int64[n].
        num_tokens: their sum.
        key: names the choice among all choices of all corpora, as JSON; None where nothing of it is kept on disk.
        folder, side: cache entry that holds the arrays, and their name in it; None where they are in memory.
    """

    ids: np.ndarray | None
    lengths: np.ndarray
    num_tokens: int
    key: Mapping[str, Any] | None = None
    folder: Path | None = None
    side: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by path where the arrays lie on disk: a worker process maps them itself."""
        if self.folder is not None:
            return _reopened, (self.folder, self.side, self.key)
        return Documents, (self.ids, self.lengths, self.num_tokens, self.key)

    def __len__(self) -> int:
        return len(self.lengths)

    def id_of(self, places: np.ndarray) -> np.ndarray:
        """Document ids, int64, of positions among the chosen documents."""
        places = places.astype(np.int64)
        return places if self.ids is None else np.asarray(self.ids[places])


def choose(corpus: Corpus, ids: np.ndarray | None, cache: ArrayCache | None = None) -> Documents:
    """Documents of a corpus by their ids (None is all), without the empty ones.

    All documents of a corpus without an empty one cost nothing, however many they are. Anything else reads lengths.

    Raises:
        DataError: an id that the corpus does not have.
    """
    if ids is None:
        key = None
        if cache is not None and corpus.num_documents >= LARGE:
            key = {"corpus": digest_of(corpus.fingerprint()), "documents": "all"}
        if corpus.num_empty == 0:
            return Documents(None, corpus.doc_lengths, corpus.num_tokens, key)
        if cache is not None and key is not None:
            what = f"the documents of {corpus.prefix} that are not empty"
            entry = cache.get("chosen", key, lambda tick: chosen_entry(corpus, {"all": _filled(corpus)}), what)
            return from_entry(entry, "all", key)
        ids = _filled(corpus)
    else:
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= corpus.num_documents):
            raise DataError(f"documents go from {ids.min()} to {ids.max()}: {corpus.prefix} has {corpus.num_documents}")
        ids = ids[corpus.doc_lengths[ids] > 0]
    lengths = corpus.doc_lengths[ids]
    return Documents(ids, lengths, int(lengths.sum()))


def chosen_entry(corpus: Corpus, sides: Mapping[str, np.ndarray]) -> Entry:
    """Cache entry for named choices of documents, int64 ids each, none of them empty."""
    arrays, facts = {}, {}
    for side, ids in sides.items():
        lengths = corpus.doc_lengths[ids]
        arrays |= {side: ids, f"{side}_lengths": lengths}
        facts[side] = int(lengths.sum())
    return Entry(arrays, facts)


def from_entry(entry: Entry, side: str, key: Mapping[str, Any] | None) -> Documents:
    """One of the choices in an entry that :func:`chosen_entry` made."""
    ids, lengths = entry.arrays[side], entry.arrays[f"{side}_lengths"]
    return Documents(ids, lengths, entry.facts[side], key, entry.folder, side)


def _filled(corpus: Corpus) -> np.ndarray:
    return np.flatnonzero(corpus.doc_lengths > 0)


def _reopened(folder: Path, side: str, key: Mapping[str, Any] | None) -> Documents:
    entry = read_entry(folder, None)
    if entry is None:
        raise DataError(f"{folder} was deleted while a run reads from it: start the run again")
    return from_entry(entry, side, key)
