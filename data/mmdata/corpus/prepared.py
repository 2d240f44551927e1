"""`PreparedFormat`: a folder made by launch/prepare.py, with train, valid, tokenizer and manifest in it."""

from __future__ import annotations

from pathlib import Path

from mmdata.corpus.indexed import IndexedCorpus


class PreparedFormat:
    """`CorpusFormat` of a prepared folder."""

    keeps_valid = True

    def matches(self, source: str) -> bool:
        """Whether `source` is a folder; one without a corpus in it is refused when its files are opened."""
        return Path(source).is_dir()

    def train(self, source: str) -> IndexedCorpus:
        """`train.bin` and `train.idx` of the folder."""
        return IndexedCorpus(Path(source, "train"))

    def valid(self, source: str) -> IndexedCorpus | None:
        """`valid.bin` and `valid.idx` of the folder, or None if nothing was held out."""
        return IndexedCorpus(Path(source, "valid")) if Path(source, "valid.idx").is_file() else None

    def tokenizer(self, source: str) -> Path:
        """The folder itself, which holds `tokenizer.json` or a manifest that says "bytes"."""
        return Path(source)
