"""Opening a corpus of any format: the registry of formats, and the only place that chooses among them.

A new format of tokenised documents is one new file in this folder (or, where it has more to it than tokens, in a room
of its own) and one line in `FORMATS`.
"""

from __future__ import annotations

from pathlib import Path

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.kept_split import kept_split
from mmdata.corpus.megatron import MegatronFormat
from mmdata.corpus.prepared import PreparedFormat
from mmdata.corpus.protocol import CorpusFormat
from mmdata.corpus.split import Split
from mmdata.corpus.token_range import check_token_range
from mmdata.images.corpus import ImageFormat
from mmdata.tokenizer_identity import TokenizerIdentity

FORMATS: tuple[CorpusFormat, ...] = (
    ImageFormat(),
    PreparedFormat(),
    MegatronFormat(),  # last: it takes every path
)


def corpus_format(source: str) -> CorpusFormat:
    """First format of the registry that `source` matches; the last one takes whatever is left."""
    return next(known for known in FORMATS if known.matches(source))


def open_corpus(
    source: str, *, vocab_size: int, valid_fraction: float, seed: int, cache: ArrayCache | None = None
) -> tuple[Split, Split | None]:
    """Training and held-out documents of the corpus at `source`, its tokens checked against a vocabulary.

    The second is None where the format keeps its held-out documents itself and has none. Where the format keeps none,
    `split_documents` chooses `valid_fraction` of all documents by a hash of their content and `seed`. What is slow to
    work out about a large corpus is kept in `cache`.

    Raises:
        DataError: a file is missing, truncated or corrupt, a token id is outside 0..vocab_size-1, or (where the
            hold-out is chosen here) `valid_fraction` is not in [0, 1).
    """
    found = corpus_format(source)
    corpus = found.train(source, cache)
    check_token_range(corpus, vocab_size, cache)
    if found.keeps_valid:
        held = found.valid(source, cache)
        return Split(corpus), None if held is None else Split(held)
    return kept_split(corpus, valid_fraction, seed, cache)


def tokenizer_path(source: str) -> Path:
    """Path of the tokenizer that the corpus at `source` keeps with it, fit for `mmdata.tokenizer.load_tokenizer`.

    Raises:
        DataError: there is no such corpus, or no tokenizer with it.
    """
    return corpus_format(source).tokenizer(source)


def tokenizer_identity(source: str) -> TokenizerIdentity | None:
    """Identity of the tokenizer that made the corpus at `source`; None where nothing on disk says it.

    Raises:
        DataError: what the disk says contradicts itself.
    """
    return corpus_format(source).tokenizer_identity(source)
