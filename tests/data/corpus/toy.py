"""A format of tokenised documents that mmdata does not know: one JSON file `NAME.toy`, a list of lists of ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.fingerprint import file_facts
from mmdata.errors import DataError


class ToyCorpus:
    """A `Corpus` with only those members that the Protocol names."""

    def __init__(self, path: Path) -> None:
        documents = json.loads(path.read_text())
        self.prefix = self.tokens_path = path
        self.num_documents = len(documents)
        self.doc_lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self.doc_offsets = np.cumsum(self.doc_lengths) - self.doc_lengths
        self.data = np.array([token for document in documents for token in document], dtype=np.int64)
        self.num_tokens, self.num_empty = len(self.data), int((self.doc_lengths == 0).sum())

    def document(self, i: int) -> np.ndarray:
        return self.data[self.doc_offsets[i] : self.doc_offsets[i] + self.doc_lengths[i]]

    def fingerprint(self) -> dict:
        return {"documents": self.num_documents, "tokens": self.num_tokens, "files": {"toy": file_facts(self.prefix)}}

    def recorded_max_id(self) -> int | None:
        return None

    def refuse_token(self, position: int, vocab_size: int) -> NoReturn:
        raise DataError(f"{self.tokens_path}: toy token {self.data[position]} is outside 0..{vocab_size - 1}")


class ToyFormat:
    """`NAME.toy`, and `NAME.valid.toy` beside it if `keeps_valid`."""

    def __init__(self, keeps_valid: bool = False) -> None:
        self.keeps_valid = keeps_valid

    def matches(self, source: str) -> bool:
        return source.endswith(".toy")

    def train(self, source: str, cache: ArrayCache | None = None) -> ToyCorpus:
        return ToyCorpus(Path(source))

    def valid(self, source: str, cache: ArrayCache | None = None) -> ToyCorpus | None:
        path = Path(source).with_suffix(".valid.toy")
        return ToyCorpus(path) if path.is_file() else None

    def tokenizer(self, source: str) -> Path:
        return Path(source).parent / "toy_tokenizer"

    def tokenizer_identity(self, source: str) -> None:
        return None


def write_toy(path: Path, documents: list[list[int]]) -> Path:
    """A toy corpus on disk."""
    path.write_text(json.dumps(documents))
    return path
