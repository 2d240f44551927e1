"""Documents of a corpus by their length: the buckets that a long-context mixture takes its shares from."""

from __future__ import annotations

import numpy as np

from mmdata.corpus.array_cache import ArrayCache, Entry, Tick
from mmdata.corpus.documents import LARGE, Documents, chosen_entry, from_entry
from mmdata.corpus.protocol import Corpus


def in_bucket(
    corpus: Corpus, documents: Documents, from_tokens: int, below: int | None, cache: ArrayCache | None = None
) -> Documents:
    """Those of some documents that have `from_tokens` tokens or more, and fewer than `below` (None: any number).

    Reads the lengths of all documents. Of 65,536 documents or more, the choice is kept in `cache` if they have a key.
    The result may be empty.
    """
    if from_tokens <= 1 and below is None:
        return documents  # empty ones are not among them

    def make(tick: Tick) -> Entry:
        chosen = documents.lengths >= from_tokens
        if below is not None:
            chosen &= documents.lengths < below
        return chosen_entry(corpus, {"bucket": documents.id_of(np.flatnonzero(chosen))})

    if cache is None or documents.key is None or len(documents) < LARGE:
        return from_entry(make(lambda done: None), "bucket", None)
    key = {**documents.key, "from_tokens": from_tokens, "below": below}
    what = f"the documents of {corpus.prefix} of {from_tokens:,} to {below if below is None else f'{below:,}'} tokens"
    return from_entry(cache.get("bucket", key, make, what), "bucket", key)
