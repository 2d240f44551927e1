"""Loading of checkpoints that runs no code from them: data out of `.metadata`, tensors and numbers of the shards."""

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

from mmtrain.checkpoint.metadata import BadMetadata, read_metadata
from mmtrain.errors import ConfigError, brief


class _Reader(dcp.FileSystemReader):
    """Torch's reader of shards, which takes only tensors from them, with metadata that were read before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
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
    try:
        return read_metadata(path)
    except BadMetadata as error:
        raise ConfigError(option, path, f"its .metadata {error}", "give another checkpoint") from error
    except OSError as error:
        raise ConfigError(option, path, f"its .metadata: {error.strerror}", "give another checkpoint") from error


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
            dcp.load(state, storage_reader=_Reader(path, metadata), planner=_Planner(), no_dist=alone)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, KeyboardInterrupt | SystemExit):  # torch wraps whatever comes up
            raise cause from None
        told = brief(cause) if alone else f"{brief(cause)} (rank {rank})"
        raise ConfigError(option, path, f"cannot be read: {told}", "give another checkpoint") from error
