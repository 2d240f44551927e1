"""Rows left where the other ranks of a host can read them, in place of an all-to-all.

NCCL moves every place of a fixed shape, the empty ones too, through buffers of its own, and what arrives is sorted by
another kernel. Here each rank leaves its rows in memory that the others have mapped, all meet, and each reads the rows
it needs in the order it needs them in (`mmkernels.peers`).

Each rank has two desks, used in turns, so one meeting an exchange is enough: who lays rows for exchange n has met the
others in exchange n - 1, where all had done with exchange n - 2, the last one from the same desk. All of it happens on
one stream, and every rank of the group has to take part in the same exchanges in the same order.

Legend: W ranks of the group, M rows of a rank, as many of them for each rank, D width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.multiprocessing.reductions import reduce_tensor

from mmkernels.peers import PeerMemory, meet, take_from_peers
from mmtrain.errors import ConfigError, brief
from mmtrain.parallel.nccl import one_host

ALIGNED = 512
"""Desks grow in steps of so many bytes."""


class Unreachable(RuntimeError):
    """Some rank of the group cannot map the others' memory. Raised on all of them, with the first one's reason."""


def reach(group: ProcessGroup, device: torch.device, exchange: str, whole_rows: bool) -> Desks | None:
    """Desks for the experts' exchange along `group`, or None if collectives have to move the rows.

    Args:
        exchange: `parallel.exchange`.
        whole_rows: whether rows need to travel along this group alone.

    Raises:
        ConfigError: they are to be read directly and cannot be.
    """
    near = group.size() > 1 and one_host(group) and whole_rows
    if exchange == "collectives" or (exchange == "auto" and not (near and device.type == "cuda")):
        return None
    reason = "its ranks are not those of one host, alone or with tp and etp the same"
    try:
        if near:
            return Desks(group, device)
    except Unreachable as error:
        reason = str(error)
    if exchange == "direct":
        raise ConfigError("parallel.exchange", exchange, f"ep={group.size()}: {reason}", "give auto or collectives")
    return None


class Desks:
    """This rank's desks and the way to those of the others.

    Args:
        group: ranks of one host. Making desks is a collective.
        device: of this rank: a GPU, or the CPU, where ranks meet through `group`.

    Raises:
        Unreachable: the ranks cannot read each other's memory.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self._signals = self._map(8 * group.size())
        self._desks: list[PeerMemory] = []
        self._size, self._exchanges = 0, 0

    def lay(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Where this rank's rows for the next exchange go, [M, D]; the same memory until they have been exchanged.

        Args:
            rows: M, like the others the same on all ranks.
        """
        needed = rows * width * dtype.itemsize
        if needed > self._size:
            self._grow(needed)
        return self._next.rows(self._next.rank, rows, width, dtype)

    def take(self, out_MD: Tensor, **wanted_M: Tensor) -> None:
        """Exchange the rows laid: meet all ranks, then read this one's arrivals.

        Args:
            out_MD: where to.
            wanted_M: `source_M` or `used_M` of :func:`mmkernels.peers.take_from_peers`.
        """
        desk = self._next
        self._exchanges += 1
        if self.device.type == "cuda":
            meet(self._signals, self._exchanges)
        else:
            dist.barrier(self.group)
        take_from_peers(desk, out_MD, **wanted_M)

    @property
    def _next(self) -> PeerMemory:
        return self._desks[self._exchanges % 2]

    def _grow(self, needed: int) -> None:
        self._size = -(-needed // ALIGNED) * ALIGNED
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # this rank has read what it wanted; mapping waits for the others
        self._desks = [self._map(self._size) for _ in range(2)]

    def _map(self, size: int) -> PeerMemory:
        """So many zeroed bytes of each rank."""
        way = _Gpu(size, self.device) if self.device.type == "cuda" else _Host(size)
        parts: list[Tensor] = []
        try:
            handles = self._together(way.lend)
            handles[self.group.rank()] = None
            self._together(
                lambda: parts.extend(way.own if handle is None else way.borrow(handle) for handle in handles)
            )
        finally:
            way.close()  # all have borrowed by now, or never will
        return PeerMemory(parts, self.group.rank())

    def _together(self, act: Callable[[], Any]) -> list[Any]:
        """What `act` returns on each rank; if it raises on one of them, all raise."""
        result, error = None, None
        try:
            result = act()
        except (RuntimeError, OSError) as caught:
            error = f"rank {dist.get_rank()}: {brief(caught)}"
        answers: list[Any] = [None] * self.group.size()
        dist.all_gather_object(answers, (result, error), group=self.group)
        if reason := next((error for _, error in answers if error is not None), None):
            raise Unreachable(reason)
        return [result for result, _ in answers]


class _Gpu:
    """Memory of this GPU, lent by CUDA's handles for other processes."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device, self.own = device, torch.zeros(size, dtype=torch.uint8, device=device)

    def lend(self) -> tuple[Any, ...]:
        torch.cuda.synchronize(self.device)  # zeros are there before anyone reads them
        rebuild, handle = reduce_tensor(self.own)
        return rebuild, *handle

    def borrow(self, lent: tuple[Any, ...]) -> Tensor:
        """The lender's memory, mapped for this GPU: tensors that say they lie here."""
        rebuild, *handle = lent
        theirs, mine = handle[_DEVICE], self.device.index
        hidden = theirs == mine or theirs >= torch.cuda.device_count()  # from this process, or the same GPU
        if not hidden and not torch.cuda.can_device_access_peer(mine, theirs):
            raise RuntimeError(f"GPU {mine} cannot read the memory of GPU {theirs}")
        # Desks of all ranks go together, so this one is counted as done with it now, and not when its tensor goes: the
        # lender would warn of memory in use, should it end first.
        counter = handle[_COUNTER], handle[_COUNTER + 1]
        handle[_DEVICE], handle[_COUNTER] = mine, handle[_COUNTER] + b"-none"
        part = rebuild(*handle)
        torch.UntypedStorage._release_ipc_counter(*counter, device=mine)
        return part

    def close(self) -> None:
        """The memory goes with the tensors."""


class _Host:
    """Memory of the host, lent as a file that is gone once all have it open."""

    def __init__(self, size: int) -> None:
        descriptor, path = tempfile.mkstemp(prefix="mmtrain-")
        os.close(descriptor)
        self.size, self.path = size, Path(path)

    def lend(self) -> str:
        self.own = self.borrow(str(self.path))  # makes the file as long as it has to be
        return str(self.path)

    def borrow(self, path: str) -> Tensor:
        return torch.from_file(path, shared=True, size=self.size, dtype=torch.uint8)

    def close(self) -> None:
        self.path.unlink()


_DEVICE, _COUNTER = 6, 11
"""Where `reduce_tensor` says on which GPU the memory is, and which file, at which place, counts its readers."""
