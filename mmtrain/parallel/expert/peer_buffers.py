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

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.peers import PeerMemory, meet, take_from_peers
from mmtrain.errors import ConfigError, brief
from mmtrain.parallel.expert.ipc_memory import lend
from mmtrain.parallel.nccl import one_host

ALIGNED = 512
"""Desks grow in steps of so many bytes."""


class Unreachable(RuntimeError):
    """Some rank of the group cannot map the others' memory. Raised on all of them, with the first one's reason."""


def reach(group: ProcessGroup, device: torch.device, exchange: str, whole_rows: bool) -> tuple[Desks | None, str]:
    """Desks for the experts' exchange along `group`, or None if collectives move the rows; and which of them, and why.

    Args:
        exchange: `parallel.exchange`.
        whole_rows: whether rows need to travel along this group alone.

    Raises:
        ConfigError: they are to be read directly and cannot be.
    """
    if exchange == "collectives":
        return None, exchange
    reason = _obstacle(group, whole_rows)
    if reason is None and exchange == "auto" and device.type != "cuda":
        return None, "collectives: there is no GPU"
    try:
        if reason is None:
            return Desks(group, device), "direct"
    except Unreachable as error:
        reason = str(error)
    if exchange == "direct":
        raise ConfigError("parallel.exchange", exchange, reason, "give auto or collectives")
    return None, f"collectives: {reason}"


def _obstacle(group: ProcessGroup, whole_rows: bool) -> str | None:
    if group.size() == 1:
        return "parallel.ep=1"
    if not one_host(group):
        return f"the {group.size()} ranks of parallel.ep are not all on one host"
    return None if whole_rows else "rows travel along etp too"


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
        way = lend(size, self.device)
        parts: list[Tensor] = []
        try:
            handles = self._together(way.handle)
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
