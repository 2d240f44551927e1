"""Peer buffers: rows left where the other ranks of a host can read them, in place of an all-to-all.

NCCL moves every slot of a fixed shape, the empty ones too, through buffers of its own, and what arrives is sorted by
another kernel. Here each rank leaves its rows in memory that the others have mapped, all meet, and each reads the rows
it needs in the order it needs them in (`mmkernels.peers`).

Each rank has two buffers, used in turns, so one meeting an exchange is enough: a rank that stages rows for exchange n
has met the others in exchange n - 1, where all had done with exchange n - 2, the last one from the same buffer. All of
it happens on one stream, and every rank of the group has to take part in the same exchanges in the same order.

Legend: W ranks of the group, M rows of a rank, as many of them for each rank, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.peers import PeerMemory, meet, take_from_peers
from mmtrain.parallel.peers.mapping import ALIGNED, PeerMapping


class PeerBuffers:
    """This rank's two buffers and the way to those of the others. COLLECTIVE over the group, as are its methods.

    Args:
        group: ranks of one host.
        device: of this rank: a GPU, or the CPU, where ranks meet through `group`.

    Raises:
        Unreachable: the ranks cannot read each other's memory.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self._mapping = PeerMapping(group, device)
        self._signals: PeerMemory | None = self._mapping.map(8 * group.size())
        self._buffers: list[PeerMemory] = []
        self._size, self._exchanges = 0, 0

    def stage(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Buffer for this rank's rows of the next exchange, [M, D]; the same memory until they have been read.

        Args:
            rows: M, like the others the same on all ranks. Buffers that are too small are made anew.
            width: D.
            dtype: of the rows.
        """
        needed = rows * width * dtype.itemsize
        if needed > self._size:
            self._grow(needed)
        return self._next.rows(self._next.rank, rows, width, dtype)

    def read(self, out_MD: Tensor, **index_M: Tensor) -> None:
        """Exchange the staged rows: meet all ranks, then read the rows that they have for this one.

        Args:
            out_MD: where to.
            index_M: `source_M` or `used_M` of :func:`mmkernels.peers.take_from_peers`.
        """
        buffer = self._next
        self._exchanges += 1
        if self.device.type == "cuda":
            meet(self._signals, self._exchanges)
        else:
            dist.barrier(self.group)
        take_from_peers(buffer, out_MD, **index_M)

    def close(self) -> None:
        """Unmap the others' memory and free this rank's, once all ranks have read what they wanted.

        No rank may wait for another in vain: after the loss of one, leave the memory to the end of the process.
        """
        held = [self._signals, *self._buffers]
        self._signals, self._buffers, self._size = None, [], 0
        self._mapping.unmap(held)

    @property
    def _next(self) -> PeerMemory:
        return self._buffers[self._exchanges % 2]

    def _grow(self, needed: int) -> None:
        self._size = -(-needed // ALIGNED) * ALIGNED
        self._mapping.unmap(self._buffers)
        self._buffers = [self._mapping.map(self._size) for _ in range(2)]
