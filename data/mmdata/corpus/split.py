"""Held-out documents, chosen by a hash of their content so that duplicates always land on the same side."""

from __future__ import annotations

import numpy as np

from mmdata.corpus.indexed import IndexedCorpus
from mmdata.errors import DataError
from mmdata.hashing import content_hash, mix_int


def check_fraction(fraction: float) -> None:
    """Refuse a hold-out fraction outside [0, 1).

    Raises:
        DataError: with the option's name, its value and the range.
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError(f"--valid-fraction is {fraction}: it must be at least 0 and less than 1, for example 0.01")


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, as bool[n], given the 64-bit content hashes (uint64[n]).

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


def split_documents(corpus: IndexedCorpus, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Document ids (train int64[n], valid int64[m]) of a corpus that comes without a hold-out of its own.

    Reads every token once. Another `seed` holds out other documents. Empty documents are in neither part.

    Raises:
        DataError: `fraction` is not in [0, 1).
    """
    check_fraction(fraction)
    ids = np.flatnonzero(corpus.doc_lengths > 0)
    hashes = [mix_int(content_hash(corpus.document(int(i)).tobytes()) ^ mix_int(seed)) for i in ids]
    chosen = held_out(np.array(hashes, dtype=np.uint64), fraction)
    return ids[~chosen], ids[chosen]
