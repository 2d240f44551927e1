"""Mapping of memory between the ranks of a host: what one of them cannot do, none of them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.peers import PeerMemory
from mmtrain.errors import brief
from mmtrain.parallel.peers.ipc_memory import allocate_ipc_memory

ALIGNED = 512
"""Mapped memory comes in steps of so many bytes."""


class Unreachable(RuntimeError):
    """Some rank of the group cannot map the others' memory. Raised on all of them, with the first one's reason."""


class PeerMapping:
    """The way by which ranks map each other's memory. Its methods are COLLECTIVE over the group.

    Args:
        group: ranks of one host.
        device: of this rank: a GPU or the CPU.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device

    def map(self, size: int) -> PeerMemory:
        """Map zeroed bytes of each rank.

        Args:
            size: at least so many, the same on all ranks.

        Raises:
            Unreachable: the ranks cannot read each other's memory.
        """
        memory = allocate_ipc_memory(-(-size // ALIGNED) * ALIGNED, self.device)
        parts: list[Tensor] = []
        try:
            handles = self.all_ranks(memory.export)
            handles[self.group.rank()] = None
            self.all_ranks(
                lambda: parts.extend(memory.own if handle is None else memory.open(handle) for handle in handles)
            )
        finally:
            memory.unlink()  # all have opened it by now, or never will
        return PeerMemory(parts, self.group.rank())

    def finish_reading(self) -> None:
        """Return when every rank's device has read what it wanted."""
        self.all_ranks(lambda: torch.cuda.synchronize(self.device) if self.device.type == "cuda" else None)

    def unmap(self, memories: list[PeerMemory]) -> None:
        """Unmap the others' memory and free this rank's, once all ranks have read what they wanted.

        No rank may wait for another in vain: after the loss of one, leave the memory to the end of the process.

        Args:
            memories: the last that refers to them; empty afterwards.
        """
        self.finish_reading()
        own = [memory.parts[memory.rank] for memory in memories]
        memories.clear()
        self.all_ranks(lambda: None)  # nobody maps this rank's memory any more
        del own

    def all_ranks(self, act: Callable[[], Any]) -> list[Any]:
        """Results of `act` on each rank; if it raises on one of them, all raise.

        Raises:
            Unreachable: with the reason of the first rank where it raised.
        """
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
