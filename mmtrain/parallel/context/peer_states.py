"""States of lightning layers fetched out of the memory of other GPUs of a host by copy engines.

NCCL's all-gather holds multiprocessors while it runs. The product that it is hidden behind takes them all, so its
programs there wait, and the product ends later by as long as the all-gather took. Copy engines hold none, nor do the
driver's operations by which the ranks' streams meet (:mod:`mmtrain.parallel.peers.stream_numbers`).

Each rank has two buffers, used in turns, so one meeting an exchange is enough: a rank overwrites a buffer two exchanges
later, when the others' numbers of the exchange between have told it that they are done with this one.

Legend: R ranks of the group, N chunks of a rank, M = N R of the row, H heads, K head dimension.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.peers import PeerMemory
from mmtrain.parallel.peers.mapping import ALIGNED, PeerMapping
from mmtrain.parallel.peers.stream_numbers import BYTES, wait_for_number, write_number

TRIAL_SECONDS = 20.0
"""Time in which the first exchange, of a few bytes, must be over; else streams cannot meet on this machine."""
_NUMBERS = 1 << 32  # the driver compares modulo this


class PeerStates:
    """This rank's two buffers and the way to those of the others. COLLECTIVE over the group, as are its methods.

    Args:
        group: ranks of one host, which start the same exchanges in the same order.
        device: of this rank: a GPU, or the CPU, where ranks meet through `group`.

    Raises:
        Unreachable: the ranks cannot read each other's memory, or their streams cannot meet.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device, self._exchanges, self._size = group, device, 0, 0
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._mapping = PeerMapping(group, device)
        self._buffers: list[PeerMemory] = []
        self._numbers = self._mapping.map(BYTES * group.size())
        self._grow(1)
        self._mapping.all_ranks(self._try_out)

    def start(self, mine_NHKK: Tensor) -> Callable[[], Tensor]:
        """Start to fetch; what is returned is called once, and gives the states of all chunks, [M, H, K, K].

        They lie rank after rank, each rank's in its own order, and may be used on the stream that asked for them.

        Args:
            mine_NHKK: states of this rank's chunks, contiguous; of the same shape and dtype on all ranks.
        """
        if mine_NHKK.nbytes > self._size:
            self._grow(mine_NHKK.nbytes)
        return self._start(mine_NHKK)

    def close(self) -> None:
        """Unmap the others' memory and free this rank's, as :meth:`PeerMapping.unmap` says."""
        held = [self._numbers, *self._buffers]
        self._buffers, self._size = [], 0
        del self._numbers
        self._mapping.unmap(held)

    def _grow(self, size: int) -> None:
        self._mapping.unmap(self._buffers)
        self._size = -(-size // ALIGNED) * ALIGNED
        self._buffers = [self._mapping.map(self._size) for _ in range(2)]

    def _start(self, mine_NHKK: Tensor) -> Callable[[], Tensor]:
        states_MHKK = mine_NHKK.new_empty(self.group.size() * mine_NHKK.shape[0], *mine_NHKK.shape[1:])
        buffer = self._buffers[self._exchanges % 2]
        self._exchanges += 1
        if self._stream is None:
            self._fetch(buffer, mine_NHKK, states_MHKK, lambda: dist.barrier(self.group), lambda peer: None)
            return lambda: states_MHKK
        stream, number = self._stream, self._exchanges % _NUMBERS
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._fetch(
                buffer,
                mine_NHKK,
                states_MHKK,
                lambda: self._tell_all(stream, number),
                lambda peer: wait_for_number(stream, self._place(self.group.rank(), peer), number),
            )
            done = stream.record_event()

        def arrive(mine_NHKK: Tensor = mine_NHKK) -> Tensor:  # whose memory is in use until then
            torch.cuda.current_stream(self.device).wait_event(done)
            return states_MHKK

        return arrive

    def _fetch(
        self,
        buffer: PeerMemory,
        mine_NHKK: Tensor,
        states_MHKK: Tensor,
        tell: Callable[[], None],
        wait: Callable[[int], None],
    ) -> None:
        """Leave this rank's states where the others find them, and copy those of each from the next rank on."""
        ranks, rank, part = self.group.size(), self.group.rank(), states_MHKK.flatten().chunk(self.group.size())
        theirs = [memory[: mine_NHKK.nbytes].view(mine_NHKK.dtype) for memory in buffer.parts]
        theirs[rank].copy_(mine_NHKK.flatten(), non_blocking=True)
        tell()
        for peer in ((rank + i) % ranks for i in range(1, ranks)):
            wait(peer)
            part[peer].copy_(theirs[peer], non_blocking=True)
        part[rank].copy_(mine_NHKK.flatten(), non_blocking=True)

    def _tell_all(self, stream: torch.cuda.Stream, number: int) -> None:
        """Write to every other rank that this one's states of an exchange are there."""
        ranks, rank = self.group.size(), self.group.rank()
        for peer in ((rank + i) % ranks for i in range(1, ranks)):
            write_number(stream, self._place(peer, rank), number)

    def _place(self, of: int, writer: int) -> int:
        """Address, as mapped here, of the number in a rank's memory that another rank writes."""
        return self._numbers.parts[of].data_ptr() + BYTES * writer

    def _try_out(self) -> None:
        """Exchange a number of each rank, and give up where that takes too long or brings another one."""
        ranks, rank = self.group.size(), self.group.rank()
        arrive = self._start(torch.full((1, 1, 1, 1), rank + 1.0, device=self.device))
        if self._stream is not None:
            done, deadline = self._stream.record_event(), time.monotonic() + TRIAL_SECONDS
            while not done.query():
                if time.monotonic() > deadline:
                    self._numbers.parts[rank].fill_(255)  # the stream waits no longer
                    raise RuntimeError(f"the streams of {ranks} GPUs did not meet in {TRIAL_SECONDS:.0f} seconds")
                time.sleep(0.001)
        if (found := arrive().flatten().tolist()) != [peer + 1.0 for peer in range(ranks)]:
            raise RuntimeError(f"states of {ranks} GPUs arrived as {found}")
