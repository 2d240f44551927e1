"""Training and held-out documents: chosen by a hash of their content, so that duplicates land on the same side.

The share held out is one of tokens, as documents of one corpus may differ in size by a factor of a million.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmdata.corpus.document_hashes import document_hashes
from mmdata.corpus.documents import Documents
from mmdata.corpus.protocol import Corpus
from mmdata.errors import DataError

SPLIT_VERSION = 2  # raise it when `split_documents` chooses otherwise: choices kept on disk are of one version

ENOUGH_TOKENS = 1 << 16  # a loss over fewer tokens moves by a hundredth or more from one choice of them to the next


@dataclass(frozen=True)
class Split:
    """Documents of one side of a split.

    Attributes:
        corpus: the corpus that holds them.
        documents: their ids, int64[n]; None is every document of the corpus.
        kept: the same documents with what rows need of them, where that has been worked out already.
    """

    corpus: Corpus
    documents: np.ndarray | None = None
    kept: Documents | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents."""
        if self.kept is not None:
            return self.kept.num_tokens
        if self.documents is None:
            return self.corpus.num_tokens
        return int(self.corpus.doc_lengths[self.documents].sum())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read."""
        return self.corpus.num_tokens == 0 or (self.documents is not None and len(self.documents) == 0)


def check_fraction(fraction: float) -> None:
    """Refuse a hold-out fraction outside [0, 1).

    Raises:
        DataError: with the option's name, its value and the range.
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError(f"--valid-fraction is {fraction}: it must be at least 0 and less than 1, for example 0.01")


def held_out(hashes: np.ndarray, tokens: np.ndarray, fraction: float) -> np.ndarray:
    """Mask of the documents that are held out, bool[n].

    Documents are taken in the order of their hash, each with its duplicates, and only where they still fit into
    `fraction` of all tokens: a giant document is passed over, and smaller ones behind it are taken. So no more than
    `fraction` of the tokens is held out, and nearly as much wherever there are small documents. The choice depends on
    hashes and sizes alone, not on the order of the documents. Where nothing fits, the smallest document is taken, as
    long as another is left for training; `fraction` 0 holds out nothing.

    Args:
        hashes: uint64[n], 64-bit hash of each document's content; equal ones are duplicates.
        tokens: integers[n], tokens of each document.
        fraction: share of the tokens to hold out, in [0, 1).
    """
    contents, group = np.unique(hashes, return_inverse=True)  # in the order of the hash
    if fraction == 0.0 or len(contents) < 2:
        return np.zeros(len(hashes), dtype=bool)
    sizes = np.zeros(len(contents), dtype=np.int64)
    np.add.at(sizes, group, tokens.astype(np.int64))
    chosen = _fitting(sizes, int(fraction * float(sizes.sum())))
    if not chosen.any():
        chosen[np.argmin(sizes)] = True  # of equal sizes the one of the lowest hash
    return chosen[group]


def held_out_warning(held: int, total: int) -> str | None:
    """One line that says how little is held out, or None where it is enough to measure a loss by.

    Args:
        held: tokens held out.
        total: tokens of the corpus, held out or not.
    """
    if held >= ENOUGH_TOKENS:
        return None
    share = f"{held:,} of {total:,} tokens ({held / max(total, 1):.2%})"
    why = "too few to measure a loss by" if held else "nothing to measure a loss on"
    return f"held out: {share}, {why} (from {ENOUGH_TOKENS:,} tokens on it is steady)"


def split_documents(
    corpus: Corpus, fraction: float, seed: int = 0, tick: Callable[[float], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of training and of held-out documents (int64[n], int64[m]) of a corpus without a hold-out of its own.

    `held_out` chooses them, by tokens. Reads every token once. Another `seed` holds out other documents. Empty
    documents are in neither part. `tick` is told the share of the documents read.

    Raises:
        DataError: `fraction` is not in [0, 1).
    """
    check_fraction(fraction)
    ids = np.flatnonzero(corpus.doc_lengths > 0)
    chosen = held_out(document_hashes(corpus, ids, seed, tick), corpus.doc_lengths[ids], fraction)
    return ids[~chosen], ids[chosen]


def _fitting(sizes: np.ndarray, room: int) -> np.ndarray:
    """Mask of the groups taken, bool[n]: in order, each that fits into what is left of `room` tokens."""
    chosen = np.zeros(len(sizes), dtype=bool)
    candidates = np.flatnonzero(sizes <= room)
    while len(candidates):  # each round takes a run of groups, up to the first that no longer fits
        ends = np.cumsum(sizes[candidates])
        count = int(np.searchsorted(ends, room, side="right"))
        chosen[candidates[:count]] = True
        room -= int(ends[count - 1])
        candidates = candidates[count:]
        candidates = candidates[sizes[candidates] <= room]
    return chosen
