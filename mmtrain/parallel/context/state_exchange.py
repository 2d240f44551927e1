"""The way that states of lightning layers take between ranks that share a row: copy engines, or an all-gather.

Legend: N chunks of a rank, M = N R of the row on R ranks, H heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.parallel.collectives import start_gather_into
from mmtrain.parallel.context.peer_states import PeerStates
from mmtrain.parallel.nccl import one_host
from mmtrain.parallel.peers.mapping import Unreachable


class StateExchange:
    """Brings the states of all chunks to every rank that shares the row. COLLECTIVE over the group, as are its methods.

    Args:
        group: the ranks that share rows.
        way: `parallel.cp_states`. By ``auto`` GPUs of one host read each other's memory, mapped at the first exchange.
    """

    def __init__(self, group: ProcessGroup, way: str = "auto") -> None:
        self.group, self._way = group, way
        self._peers: PeerStates | None = None
        self._chosen = False
        self._notes: list[str] = []

    def start(self, mine_NHKK: Tensor) -> Callable[[], Tensor]:
        """Start an exchange; what is returned is called once, and gives the states, [M, H, K, K], rank after rank.

        Args:
            mine_NHKK: states of this rank's chunks, contiguous; of the same shape and dtype on all ranks.
        """
        if not self._chosen:
            self._choose(mine_NHKK.device)
        if self._peers is not None:
            return self._peers.start(mine_NHKK)
        states_MHKK = mine_NHKK.new_empty(self.group.size() * mine_NHKK.shape[0], *mine_NHKK.shape[1:])
        work = start_gather_into(states_MHKK, mine_NHKK, self.group)

        def arrive(mine_NHKK: Tensor = mine_NHKK) -> Tensor:  # whose memory is in use until then
            work.wait()
            return states_MHKK

        return arrive

    def take_notes(self) -> list[str]:
        """Lines for the log since the last call. Not collective."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Unmap and free what was mapped; the next exchange maps it anew."""
        if self._peers is not None:
            self._peers.close()
        self._peers, self._chosen = None, False

    def _choose(self, device: torch.device) -> None:
        self._chosen = True
        if self._way == "collectives" or device.type != "cuda" or not one_host(self.group):
            return
        try:
            self._peers = PeerStates(self.group, device)
        except Unreachable as error:
            self._notes.append(f"states of lightning layers travel by collectives: {error}")
