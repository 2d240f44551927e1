"""`PreparedFormat`: a folder made by launch/prepare.py, with train, valid, tokenizer and manifest in it."""

from __future__ import annotations

from pathlib import Path

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.indexed import IndexedCorpus
from mmdata.tokenizer_identity import TokenizerIdentity, identity_on_record


class PreparedFormat:
    """`CorpusFormat` of a prepared folder."""

    keeps_valid = True

    def matches(self, source: str) -> bool:
        """Whether `source` is a folder; one without a corpus in it is refused when its files are opened."""
        return Path(source).is_dir()

    def train(self, source: str, cache: ArrayCache | None = None) -> IndexedCorpus:
        """`train.bin` and `train.idx` of the folder."""
        return IndexedCorpus(Path(source, "train"), cache)

    def valid(self, source: str, cache: ArrayCache | None = None) -> IndexedCorpus | None:
        """`valid.bin` and `valid.idx` of the folder, or None if nothing was held out."""
        return IndexedCorpus(Path(source, "valid"), cache) if Path(source, "valid.idx").is_file() else None

    def tokenizer(self, source: str) -> Path:
        """The folder itself, which holds `tokenizer.json` or a manifest that says "bytes"."""
        return Path(source)

    def tokenizer_identity(self, source: str) -> TokenizerIdentity | None:
        """Identity by the folder's manifest and `tokenizer.json`; None where there is neither."""
        tokens = Path(source, "train.bin")
        return identity_on_record(Path(source), "train", tokens.stat().st_size) if tokens.is_file() else None
