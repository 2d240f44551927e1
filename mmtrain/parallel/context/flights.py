"""Messages between single ranks of a group that are under way together, unseen by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Message = tuple[Tensor, int]
"""A contiguous tensor and the rank in the group that it comes from or goes to."""


class Flight:
    """A group of sends and receives, started at once; their tensors live until they have been waited for.

    Between two ranks, messages meet in the order in which they were given. A rank without any takes no part. With NCCL
    the group must have run a collective before, because the first call connects all ranks of it.
    """

    def __init__(self, send: Sequence[Message], receive: Sequence[Message], group: ProcessGroup) -> None:
        # Ascending in time on both sides, and both lists at once: nobody waits for a turn.
        self._messages = [
            dist.P2POp(way, tensor, dist.get_global_rank(group, rank), group)
            for way, messages in ((dist.irecv, receive), (dist.isend, send))
            for tensor, rank in messages
            if tensor.numel()
        ]
        self._works = dist.batch_isend_irecv(self._messages) if self._messages else []

    def wait(self) -> None:
        """Let what follows on this device come after all messages; on the CPU, wait for them."""
        for work in self._works:
            work.wait()
        self._works, self._messages = [], []
