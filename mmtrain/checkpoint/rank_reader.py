"""Reader of the ranks' files: parts of tensors, copied straight from the bytes on the disk to where they belong."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from mmtrain.checkpoint.safetensors_file import TensorFile
from mmtrain.checkpoint.tensor_index import Place, Value


class RankReader(StorageReader):
    """What `dcp.load` takes parts of tensors from.

    Args:
        path: of the checkpoint.
        metadata: of it (`tensor_index.read_index`).
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self._path, self._metadata = path, metadata

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept from one call to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index that was read and checked."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Take a rank's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take all plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every part of the plan, file by file and in the order of their bytes."""
        storage = self._metadata.storage_data
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        for item in values:
            value: Value = storage[item.storage_index]
            planner.load_bytes(item, io.BytesIO(json.dumps(value.plain).encode()))
        tensors.sort(key=lambda item: _order(storage[item.storage_index]))
        name, file = "", None
        for item in tensors:
            place: Place = storage[item.storage_index]
            if file is None or place.file != name:
                name, file = place.file, TensorFile(self._path / place.file)
            target = planner.resolve_tensor(item).detach()
            target.copy_(_narrowed(file.tensor(place.entry), item))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Not chosen by a path."""
        return False


class PlainLoadPlanner(DefaultLoadPlanner):
    """Torch's planner, for values that are JSON: each takes the type of what stands in its place now."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value of the index where the state has it (ValueError: it is of another kind than what is there)."""
        found = json.load(value)
        name = read_item.dest_index.fqn
        if not _is_alike(found, self.state_dict[name]):
            raise ValueError(f"{name} is {str(found)[:40]} there, and {str(self.state_dict[name])[:40]} here")
        if isinstance(self.state_dict[name], tuple):
            found = tuple(found)  # JSON has lists alone
        *path, last = self.mappings[name]
        place = self.original_state_dict
        for key in path:
            place = place[key]
        place[last] = found


def _is_alike(found: Any, now: Any) -> bool:
    """Whether a value may take another's place: a number a number's, a list that of one of such values, None any."""
    if found is None or now is None:
        return True
    if isinstance(now, list | tuple):
        same = isinstance(found, list) and len(found) == len(now)
        return same and all(map(_is_alike, found, now))
    if type(now) in (int, float):
        return type(found) in (int, float)
    return type(found) is type(now)


def _order(place: Place) -> tuple[str, int]:
    return place.file, place.entry.begin


def _narrowed(tensor: Tensor, item: ReadItem) -> Tensor:
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        tensor = torch.narrow(tensor, dim, start, length)
    return tensor
