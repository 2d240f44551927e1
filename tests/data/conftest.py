"""Corpora and texts that the data tests share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.writer import builder_class


@pytest.fixture
def megatron_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Writes documents (each a list of sequences) with megatron-core's builder alone; returns the prefix."""

    def write(documents: Sequence[Sequence[Sequence[int]]], dtype: type = np.uint16, name: str = "megatron") -> Path:
        prefix = tmp_path / name
        builder = builder_class()(f"{prefix}.bin", dtype=dtype)
        for sequences in documents:
            flat = [token for sequence in sequences for token in sequence]
            builder.add_document(np.array(flat, dtype=dtype), [len(sequence) for sequence in sequences])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


@pytest.fixture
def numbered_corpus(megatron_corpus: Callable[..., Path]) -> Callable[..., IndexedCorpus]:
    """A corpus of documents of given lengths in which every token is unique: 1, 2, ... in the corpus's order.

    There is no EOD in it (Megatron's tools write it only when asked), so a 0 in a row is padding for certain.
    """

    def write(lengths: Sequence[int], name: str = "numbered") -> IndexedCorpus:
        documents, next_token = [], 1
        for length in lengths:
            documents.append([range(next_token, next_token + length)])
            next_token += length
        return IndexedCorpus(megatron_corpus(documents, np.int32, name))

    return write


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """60 small text files, among them two of equal content."""
    folder = tmp_path / "texts"
    folder.mkdir()
    generator = random.Random(7)
    words = ["alpha", "beta", "gamma", "délta", "日本", "def", "return", "x", "\n    ", "0.5", "😀"]
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(" ".join(generator.choices(words, k=generator.randint(5, 300))))
    (folder / "59.txt").write_bytes((folder / "00.txt").read_bytes())
    return folder
