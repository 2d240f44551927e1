"""The choice of held-out documents, worked out once for a large corpus and then read from its cache."""

from __future__ import annotations

from mmdata.corpus.array_cache import ArrayCache, Entry, Tick
from mmdata.corpus.documents import chosen_entry, from_entry
from mmdata.corpus.fingerprint import digest_of
from mmdata.corpus.protocol import Corpus
from mmdata.corpus.split import SPLIT_VERSION, Split, check_fraction, split_documents

LARGE_DOCUMENTS = 1 << 14  # a corpus with as many documents, or tokens, is split once; a smaller one takes no time
LARGE_TOKENS = 1 << 24
_SIDES = ("train", "valid")


def kept_split(corpus: Corpus, fraction: float, seed: int, cache: ArrayCache | None) -> tuple[Split, Split]:
    """Training and held-out documents as `split_documents` chooses them, from the cache where they are in it.

    Raises:
        DataError: `fraction` is not in [0, 1).
    """
    check_fraction(fraction)
    small = corpus.num_documents < LARGE_DOCUMENTS and corpus.num_tokens < LARGE_TOKENS
    if cache is None or small:
        train, valid = split_documents(corpus, fraction, seed)
        return Split(corpus, train), Split(corpus, valid)
    key = {"corpus": digest_of(corpus.fingerprint()), "fraction": fraction, "seed": seed, "version": SPLIT_VERSION}

    def make(tick: Tick) -> Entry:
        return chosen_entry(corpus, dict(zip(_SIDES, split_documents(corpus, fraction, seed, tick), strict=True)))

    entry = cache.get("split", key, make, f"the held-out documents of {corpus.prefix} (every token is read once)")
    sides = [from_entry(entry, side, key | {"side": side}) for side in _SIDES]
    train, valid = (Split(corpus, side.ids, side) for side in sides)
    return train, valid
