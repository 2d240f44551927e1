"""Token ids of a corpus against a vocabulary, before training starts."""

from __future__ import annotations

import numpy as np

from mmdata.corpus.array_cache import ArrayCache, Entry, Tick
from mmdata.corpus.fingerprint import digest_of
from mmdata.corpus.protocol import Corpus
from mmdata.errors import DataError

SCAN_TOKENS = 64_000_000  # tokens that `check_token_range` reads at most when the corpus has no record of its ids
_SCAN_STEP = 1 << 22


def check_token_range(corpus: Corpus, vocab_size: int, cache: ArrayCache | None = None) -> str:
    """Check up front that a corpus fits a vocabulary, and say in one line how that was found out.

    The largest id that the corpus has on record (a manifest's, for this very file) answers at once. Without a record,
    tokens are read, at most 64M of them, and the returned line says how many of how many. (Rows are checked again as
    they are read.) With a `cache`, that reading is done once for a corpus of 4M tokens or more.

    Raises:
        DataError: a token is outside 0..vocab_size-1.
    """
    largest = corpus.recorded_max_id()
    if largest is not None:
        if largest >= vocab_size:
            raise DataError(
                f"{corpus.tokens_path} holds token id {largest}, outside 0..{vocab_size - 1}: "
                f"use a model vocabulary of at least {largest + 1}, or prepare the corpus with the model's tokenizer"
            )
        return f"{corpus.prefix}: largest token id {largest} by its manifest, vocabulary {vocab_size}"
    read = min(SCAN_TOKENS, corpus.num_tokens)
    if cache is None or corpus.num_tokens < _SCAN_STEP:
        scan_tokens(corpus, vocab_size, SCAN_TOKENS)
    else:
        key = {"corpus": digest_of(corpus.fingerprint()), "tokens": read, "format": 1}
        what = f"the range of token ids of {corpus.prefix}"
        found = cache.get("ids", key, lambda tick: _scan_range(corpus, read, tick), what).facts
        if found["smallest"] < 0 or found["largest"] >= vocab_size:
            scan_tokens(corpus, vocab_size, SCAN_TOKENS)  # finds the place, and raises
    return f"{corpus.prefix}: {read:,} of {corpus.num_tokens:,} tokens read, all below {vocab_size} (no manifest)"


def _scan_range(corpus: Corpus, stop: int, tick: Tick) -> Entry:
    """Smallest and largest of the first `stop` token ids."""
    smallest, largest = 0, -1
    for start in range(0, stop, _SCAN_STEP):
        part = corpus.data[start : min(start + _SCAN_STEP, stop)]
        smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
        tick(start / stop)
    return Entry({}, {"smallest": smallest, "largest": largest})


def scan_tokens(corpus: Corpus, vocab_size: int, limit: int | None = None) -> int:
    """Check that each of the first `limit` tokens (default: all) lies in 0..vocab_size-1; return how many were read.

    Raises:
        DataError: naming the file, the document and the id.
    """
    stop = corpus.num_tokens if limit is None else min(limit, corpus.num_tokens)
    for start in range(0, stop, _SCAN_STEP):
        part = corpus.data[start : min(start + _SCAN_STEP, stop)]
        bad = np.flatnonzero((part >= vocab_size) | (part < 0))
        if len(bad):
            corpus.refuse_token(start + int(bad[0]), vocab_size)
    return stop
