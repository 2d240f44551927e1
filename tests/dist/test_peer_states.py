"""States fetched out of other processes' memory: exchanges of changing size, two at a time, ranks that cannot."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mmtrain.config import ClusterConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.context.peer_states import PeerStates
from mmtrain.parallel.peers.ipc_memory import HostIpcMemory
from mmtrain.parallel.peers.mapping import Unreachable
from tests.dist.pool import Pool

SIZES = [(2, 3, 4), (2, 3, 4), (1, 1, 2), (8, 3, 4), (2, 3, 4), (16, 5, 8), (1, 1, 1), (16, 5, 8)] * 3


def exchange_often() -> bool:
    """Whether every exchange brought all ranks' states of that exchange, with one rank that is late each time."""
    mesh.start(ClusterConfig(device="cpu"))
    try:
        group = dist.group.WORLD
        peers, rank, ranks, right = PeerStates(group, torch.device("cpu")), group.rank(), group.size(), True
        late = None
        for number, (chunks, heads, width) in enumerate(SIZES):
            if number % ranks == rank:
                torch.randn(400, 400).mm(torch.randn(400, 400))
            dtype = (torch.float32, torch.float64)[number % 2]
            value = torch.arange(chunks * heads * width * width, dtype=dtype).view(chunks, heads, width, width)
            arrive = peers.start(value + 1000.0 * rank + number)
            wanted = torch.cat([value + 1000.0 * peer + number for peer in range(ranks)])
            for call, states in late or ():  # the exchange before, asked for after this began
                right &= torch.equal(call(), states)
            late = ((arrive, wanted),)
        for call, states in late or ():
            right &= torch.equal(call(), states)
        peers.close()
        return right
    finally:
        mesh.stop()


def test_every_exchange_brings_its_own_states(pool: Pool) -> None:
    assert all(pool.run(exchange_often, world=4))


def one_cannot() -> str:
    """What a rank is told where the last one cannot map."""
    mesh.start(ClusterConfig(device="cpu"))
    last = dist.get_rank() == dist.get_world_size() - 1
    broken = mock.patch.object(HostIpcMemory, "open", side_effect=OSError("no such device")) if last else nullcontext()
    try:
        with broken, pytest.raises(Unreachable) as raised:
            PeerStates(dist.group.WORLD, torch.device("cpu"))
        return str(raised.value)
    finally:
        mesh.stop()


def test_all_ranks_give_up_where_one_cannot(pool: Pool) -> None:
    assert pool.run(one_cannot, world=2) == ["rank 1: OSError: no such device"] * 2
