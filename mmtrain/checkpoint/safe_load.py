"""Loading of checkpoints that runs no code from them, also of those of before format 3, which consist of pickles."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from mmtrain.checkpoint.metadata import FILE_NAME, BadMetadata, read_metadata
from mmtrain.checkpoint.rank_reader import PlainLoadPlanner, RankReader
from mmtrain.checkpoint.tensor_index import INDEX, BadIndex, read_index
from mmtrain.errors import ConfigError, brief


class _OldReader(dcp.FileSystemReader):
    """Torch's reader of its own shards, which takes only tensors from them, with metadata that were read before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _OldPlanner(dcp.DefaultLoadPlanner):
    """Torch's planner, which unpickles whatever is not a tensor, with entries that were read as plain data first."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def metadata_of(option: str, path: Path) -> Metadata:
    """Return the metadata of the checkpoint that an option gave.

    Raises:
        ConfigError: they cannot be read, are damaged, or ask for code.
    """
    name = FILE_NAME if is_old(path) else INDEX
    try:
        return read_metadata(path) if is_old(path) else read_index(path)
    except (BadMetadata, BadIndex) as error:
        raise ConfigError(option, path, f"its {name} {error}", "give another checkpoint") from error
    except OSError as error:
        raise ConfigError(option, path, f"its {name}: {error.strerror}", "give another checkpoint") from error


def is_old(path: Path) -> bool:
    """Tell whether a checkpoint is of before format 3."""
    return not (path / INDEX).exists() and (path / FILE_NAME).exists()


def load_shards(option: str, path: Path, metadata: Metadata, state: dict[str, Any], alone: bool = False) -> None:
    """Read a checkpoint into the tensors of a nested `state`, in place. Collective unless `alone`.

    Args:
        option: the option that the checkpoint came from, for messages.
        path: folder of the checkpoint.
        metadata: its metadata (:func:`metadata_of`).
        state: what is wanted of it; entries that are not tensors are replaced.
        alone: this process reads on its own, without a process group.

    Raises:
        ConfigError: the checkpoint is damaged, or holds something else than was asked for; on all ranks alike.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own deprecations
            if is_old(path):
                dcp.load(state, storage_reader=_OldReader(path, metadata), planner=_OldPlanner(), no_dist=alone)
            else:
                dcp.load(state, storage_reader=RankReader(path, metadata), planner=PlainLoadPlanner(), no_dist=alone)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, KeyboardInterrupt | SystemExit):  # torch wraps whatever comes up
            raise cause from None
        told = brief(cause) if alone else f"{brief(cause)} (rank {rank})"
        raise ConfigError(option, path, f"cannot be read: {told}", "give another checkpoint") from error
