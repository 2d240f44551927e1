"""Writer of a rank's tensors: torch plans who writes what, and each rank writes its parts as one safetensors file.

The plan is kept from save to save: to make it takes 0.5 s for 225 tensors of two ranks, to take the same parts again
0.02 s.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mmtrain.checkpoint.manifest import FileSum
from mmtrain.checkpoint.safetensors_file import NAMES, Entry, Planned, header_of, write_tensors
from mmtrain.checkpoint.tensor_index import Place, Value, rank_file


class PlainPlanner(DefaultSavePlanner):
    """Torch's planner, which hands what is not a tensor on as it is, not pickled."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return it as it is."""
        return object


class RankWriter(StorageWriter):
    """What `dcp.save` hands a rank's part of a state to. Nothing is written until :meth:`write`.

    One writer serves the saves of one model and optimizer in one layout.

    Attributes:
        planned: the tensors of this rank's file, wider dtypes first, so that each begins at a multiple of its size.
        tensors: these tensors, as they are in the state.
        names: of what they are parts of.
        metadata: of all ranks' tensors, for the index; on the coordinator, once all have planned.
    """

    def __init__(self) -> None:
        self._folder, self._file = Path(), ""
        self._known: frozenset[str] | None = None  # names in the state that was planned for
        self._items: list[WriteItem] = []  # of `tensors`
        self._values: dict[MetadataIndex, Any] = {}  # that this rank tells
        self._value_items: list[WriteItem] = []
        self.planned: list[Planned] = []
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.metadata: Metadata | None = None

    def take(self, folder: Path, state: dict[str, Any]) -> None:
        """Take this rank's part of a state, by the plan of the save before if that fits it on every rank. Collective.

        Args:
            folder: where the files of all ranks will come.
            state: what `dcp.save` takes.

        Raises:
            CheckpointException: a rank could not plan; on all ranks.
        """
        self._folder = folder
        changed = self._take_again(state)
        told: list[dict[MetadataIndex, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, changed)
        if any(one is None for one in told):
            dcp.save(state, storage_writer=self, planner=PlainPlanner())
            self._known = frozenset(_flat(state).state_dict)
        elif self.metadata is not None:
            self.metadata.storage_data |= {index: Value(one) for of in told for index, one in (of or {}).items()}

    def _take_again(self, state: dict[str, Any]) -> dict[MetadataIndex, Any] | None:
        """Take the parts of the last plan, and return the values that changed since; None if it does not fit."""
        if self._known is None:
            return None
        planner = _flat(state)
        if planner.state_dict.keys() != self._known:
            return None
        try:
            self.tensors = [planner.resolve_data(item).detach() for item in self._items]
        except (KeyError, ValueError):  # no part begins where one did
            return None
        if self.planned != _planned(self._items, self.tensors):
            return None
        before = self._values
        self._values = {item.index: planner.resolve_data(item) for item in self._value_items}
        return {index: value for index, value in self._values.items() if value != before[index]}

    def write(self, tensors: Sequence[Tensor] | None = None) -> dict[str, FileSum]:
        """Write this rank's file, and return its size and checksum by its name; none where it has no tensor.

        Args:
            tensors: copies of `tensors` on the host, to write in their place.

        Raises:
            OSError: it cannot be written.
        """
        if not self.planned:
            return {}
        state, size = xxhash.xxh3_128(), 0

        def look(part: memoryview) -> None:
            nonlocal size
            state.update(part)
            size += len(part)

        if tensors is None and any(tensor.is_cuda for tensor in self.tensors):
            torch.cuda.synchronize()  # another thread copies them, whose work is in no order with this one's
        given = (tensor.cpu() for tensor in (self.tensors if tensors is None else tensors))  # one at a time
        write_tensors(self._folder / self._file, self.planned, given, look)
        return {self._file: FileSum(size, state.hexdigest())}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept from one call to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Take a rank's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank the name of its file."""
        return [replace(plan, storage_data=rank_file(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Take note of what is to be written, and tell where in the file each part will lie."""
        self._file = plan.storage_data
        self._value_items = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        self._values = {item.index: planner.resolve_data(item) for item in self._value_items}
        results = [WriteResult(index, 0, Value(value)) for index, value in self._values.items()]
        parts = [
            (item, planner.resolve_data(item).detach()) for item in plan.items if item.type != WriteItemType.BYTE_IO
        ]
        parts.sort(key=lambda pair: -pair[1].itemsize)  # stable: else in the order of the state
        self._items, self.tensors = [item for item, _ in parts], [tensor for _, tensor in parts]
        self.names = [item.index.fqn for item in self._items]
        self.planned = _planned(self._items, self.tensors)
        begin = len(header_of(self.planned))
        for item, one in zip(self._items, self.planned, strict=True):
            place = Place(self._file, Entry(NAMES[one.dtype], one.shape, begin))
            results.append(WriteResult(item.index, one.bytes, place))
            begin += one.bytes
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Keep the places of all ranks' parts; on the coordinator."""
        metadata.storage_data = {one.index: one.storage_data for of_rank in results for one in of_rank}
        self.metadata = metadata

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Not chosen by a path."""
        return False


def _flat(state: dict[str, Any]) -> PlainPlanner:
    """Return a planner that finds the parts of a state by their names."""
    planner = PlainPlanner()
    planner.set_up_planner(state)
    return planner


def _planned(items: Sequence[WriteItem], tensors: Sequence[Tensor]) -> list[Planned]:
    return [
        Planned(_name(item), tensor.dtype, tuple(tensor.shape)) for item, tensor in zip(items, tensors, strict=True)
    ]


def _name(item: WriteItem) -> str:
    """Return a part's name within its file: its tensor's, with the part's place in it if it is not the whole."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if math.prod(chunk.sizes) == math.prod(item.tensor_data.size):
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(map(str, chunk.offsets))}]"
