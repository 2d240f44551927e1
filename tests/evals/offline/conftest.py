"""A run with a checkpoint and a corpus with held-out text, made without megatron-core, whose import is slow."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus.manifest import NAME, Manifest, SplitInfo
from tests.infer.chain import EOD, chain_model, save_run

UINT16 = 8  # its code in an index


def write_split(prefix: Path, documents: int, seed: int) -> SplitInfo:
    """Documents of bytes in Megatron's layout: `.bin` has the tokens, `.idx` header, lengths, offsets and documents."""
    rng = np.random.default_rng(seed)
    made = [[*" ".join(rng.choice(["alpha", "beta", "gamma"], 20)).encode(), EOD] for _ in range(documents)]
    lengths = np.array([len(document) for document in made], dtype=np.int32)
    np.concatenate(made).astype(np.uint16).tofile(f"{prefix}.bin")
    offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, UINT16, documents, documents + 1)
    parts = (lengths, offsets, np.arange(documents + 1, dtype=np.int64))
    Path(f"{prefix}.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    files = {f"{prefix.name}.bin": {"bytes": 2 * int(lengths.sum()), "sha256": ""}}
    return SplitInfo(documents, int(lengths.sum()) - documents, int(lengths.sum()), EOD, files)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with about 12,000 tokens held out."""
    folder = tmp_path_factory.mktemp("corpus")
    splits = {name: write_split(folder / name, 110, seed) for seed, name in enumerate(("train", "valid"))}
    tokenizer = {"kind": "bytes", "sha256": None, "content": None, "trained_on": None}
    Manifest("", tokenizer, EOD + 1, EOD, "uint16", splits, {}, {}).write(folder / NAME)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run that names the corpus."""
    folder = tmp_path_factory.mktemp("runs") / "chain"
    save_run(folder, chain_model(certainty=3.0), data={"path": str(corpus), "seed": 1, "valid_fraction": 0.1})
    return folder
