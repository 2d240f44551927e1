"""Writer of a rank's tensors: torch plans who writes what, and each rank writes its parts as one safetensors file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata
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

    Args:
        folder: where the files of all ranks come.

    Attributes:
        planned: the tensors of this rank's file, wider dtypes first, so that each begins at a multiple of its size.
        tensors: these tensors, as they are in the state.
        names: of what they are parts of.
        metadata: of all ranks' tensors, for the index; on the coordinator, once all have planned.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, ""
        self.planned: list[Planned] = []
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.metadata: Metadata | None = None

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

        def wrote(part: memoryview) -> None:
            nonlocal size
            state.update(part)
            size += len(part)

        given = (tensor.cpu() for tensor in (self.tensors if tensors is None else tensors))  # one at a time
        write_tensors(self._folder / self._file, self.planned, given, wrote)
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
        parts = [(item, planner.resolve_data(item)) for item in plan.items]
        results = [
            WriteResult(item.index, 0, Value(value)) for item, value in parts if item.type == WriteItemType.BYTE_IO
        ]
        tensors = [(item, value.detach()) for item, value in parts if item.type != WriteItemType.BYTE_IO]
        tensors.sort(key=lambda pair: -pair[1].itemsize)  # stable: else in the order of the state
        self.tensors = [tensor for _, tensor in tensors]
        self.names = [item.index.fqn for item, _ in tensors]
        self.planned = [Planned(_name(item), tensor.dtype, tuple(tensor.shape)) for item, tensor in tensors]
        begin = len(header_of(self.planned))
        for (item, _), one in zip(tensors, self.planned, strict=True):
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


def _name(item: WriteItem) -> str:
    """Return a part's name within its file: its tensor's, with the part's place in it if it is not the whole."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if math.prod(chunk.sizes) == math.prod(item.tensor_data.size):
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(map(str, chunk.offsets))}]"
