"""Training and held-out documents: chosen by a hash of their content, so that duplicates land on the same side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmdata.corpus.document_hashes import document_hashes
from mmdata.corpus.documents import Documents
from mmdata.corpus.protocol import Corpus
from mmdata.errors import DataError

SPLIT_VERSION = 1  # raise it when `split_documents` chooses otherwise: choices kept on disk are of one version


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


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Mask of the documents that are held out, bool[n], from their 64-bit content hashes, uint64[n].

    A document is held out when its hash lies in the lowest `fraction` of all hashes. A corpus so small that this
    catches nothing gives up the document with the lowest hash (and its duplicates), as long as one other is left for
    training; `fraction` 0 holds out nothing.
    """
    chosen = np.zeros(len(hashes), dtype=bool)
    if fraction == 0.0 or len(hashes) == 0:
        return chosen
    chosen = hashes < np.uint64(int(fraction * 2.0**64))
    if not chosen.any():
        chosen = hashes == hashes.min()
    elif chosen.all():
        chosen = hashes != hashes.max()
    return chosen if not chosen.all() else np.zeros(len(hashes), dtype=bool)


def split_documents(
    corpus: Corpus, fraction: float, seed: int = 0, tick: Callable[[float], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of training and of held-out documents (int64[n], int64[m]) of a corpus without a hold-out of its own.

    Reads every token once. Another `seed` holds out other documents. Empty documents are in neither part.
    `tick` is told the share of the documents read.

    Raises:
        DataError: `fraction` is not in [0, 1).
    """
    check_fraction(fraction)
    ids = np.flatnonzero(corpus.doc_lengths > 0)
    chosen = held_out(document_hashes(corpus, ids, seed, tick), fraction)
    return ids[~chosen], ids[chosen]
