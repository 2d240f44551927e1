"""64-bit hashes of the content of documents, many at a time."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from mmdata.corpus.protocol import Corpus
from mmdata.hashing import mix_array, mix_int

_CHUNK = 1 << 16  # documents between two reports of the share done


def document_hashes(
    corpus: Corpus, ids: np.ndarray, seed: int, tick: Callable[[float], None] | None = None
) -> np.ndarray:
    """`mix_int(content_hash(document) ^ mix_int(seed))` of each document, uint64[n]. Reads their tokens.

    Args:
        corpus: that holds them.
        ids: int64[n].
        seed: gives other hashes.
        tick: is told the share of the documents done.
    """
    hashes, data = np.empty(len(ids), dtype=np.uint64), corpus.data
    for first in range(0, len(ids), _CHUNK):
        part = ids[first : first + _CHUNK]
        starts = corpus.doc_offsets[part]
        bounds = zip(starts.tolist(), (starts + corpus.doc_lengths[part]).tolist(), strict=True)
        digests = b"".join([blake2b(data[start:stop], digest_size=8).digest() for start, stop in bounds])
        hashes[first : first + len(part)] = np.frombuffer(digests, dtype="<u8")
        if tick is not None:
            tick((first + len(part)) / len(ids))
    return mix_array(hashes ^ np.uint64(mix_int(seed)))
