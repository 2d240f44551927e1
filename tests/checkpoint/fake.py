"""Checkpoints that are whole by their files, without a model in them."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mmtrain.checkpoint.manifest import write_manifest
from mmtrain.checkpoint.tensor_index import INDEX, rank_file
from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHARD, SIZE = "__0_0.distcp", 100


def config(folder: Path, *overrides: str) -> PretrainConfig:
    """The options of a run `r` in `folder`."""
    given = ["stage=quickstart", "data.path=x", f"run.dir={folder}", "run.name=r"]
    return compose([*given, *overrides], CONFIGS)


def metadata() -> Metadata:
    """The metadata of one tensor in one shard."""
    size = torch.Size([2, 3])
    tensor = TensorStorageMetadata(
        TensorProperties(torch.float32), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)]
    )
    storage = {MetadataIndex("model.w", [0, 0], 0): _StorageInfo(SHARD, 10, SIZE - 10)}
    return Metadata({"model.w": tensor}, {"model.w": ("model", "w")}, storage, StorageMeta(Path("/x")), "1.0.0")


def checkpoint(path: Path, made_with: PretrainConfig | dict[str, Any], step: int = 3, **progress: int) -> Path:
    """A whole checkpoint at `path`, of a run with these options, ten tokens a step unless told otherwise.

    It is as versions before checksums wrote it; with `format=2` it has a manifest, with `format=3` an index in JSON.
    """
    path.mkdir(parents=True)
    recorded = made_with if isinstance(made_with, dict) else asdict(made_with)
    (path / "meta.json").write_text(
        json.dumps({"step": step, "tokens": 10 * step, "rope_base": 1e4, "config": recorded} | progress)
    )
    if progress.get("format") == 3:
        part = [rank_file(0), SIZE - 24, [0, 0], [2, 3]]
        index = {"tensors": {"model.w": {"dtype": "F32", "shape": [2, 3], "parts": [part]}}, "values": {}}
        (path / INDEX).write_text(json.dumps(index))
        (path / rank_file(0)).write_bytes(step.to_bytes(SIZE, "big"))
    else:
        (path / ".metadata").write_bytes(pickle.dumps(metadata()))
        (path / SHARD).write_bytes(step.to_bytes(SIZE, "big"))
    if "format" in progress:
        write_manifest(path, step, {})
    return path


def said(lines: list[str]) -> str:
    """The one line of a list."""
    (line,) = lines
    return line
