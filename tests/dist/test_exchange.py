"""What an exchange of experts makes, when, and that it gives all of it back."""

from __future__ import annotations

import gc
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.expert import connection
from mmtrain.parallel.expert.exchange import ExpertExchange, build_exchange
from mmtrain.parallel.layout import plan_layout
from tests.dist.layouts import MODEL
from tests.dist.pool import Pool
from tests.dist.test_experts import exchanged_once


def mappings() -> int:
    """Files of peer buffers that this process has mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/mmtrain-")


def named_files() -> list[str]:
    """Mapped files of peer buffers that still have a name, and so would stay behind."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "/mmtrain-" in line and not line.endswith("(deleted)")]


def is_open(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows the group."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except KeyError:
        return False


class Made:
    """Stands in for `all_channels_group`, which makes nothing on a CPU: new groups of the same ranks, kept here."""

    def __init__(self) -> None:
        self.groups: list[dist.ProcessGroup] = []

    def __call__(self, group: dist.ProcessGroup, device: torch.device, host_tensors: bool = True) -> dist.ProcessGroup:
        if group.size() == 1:
            return group
        self.groups.append(dist.new_group(dist.get_process_group_ranks(group)))
        return self.groups[-1]


def outputs(exchange: ExpertExchange, parallel: ParallelConfig) -> dict[str, Tensor]:
    """Output and gradients of this rank's micro-batch."""
    return exchanged_once(exchange, (exchange.groups.ep_rank, 0), parallel, "balanced, slots", dist.get_rank())


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def life(way: str) -> str:
    """An exchange from its making to its end, and a second one in the same processes."""
    parallel = ParallelConfig(ep=4)
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, MODEL))
    axes, tp_group, made = context.expert["ep", "etp"], context.dense["tp"].get_group(), Made()
    buffers = 4 if way == "direct" else 0  # of two in turns, from each rank
    with mock.patch.object(connection, "all_channels_group", made), mock.patch.dict("os.environ", LOCAL_WORLD_SIZE="4"):
        exchange = build_exchange(axes, tp_group, context.device, token_groups=2, exchange=way)
        several = outputs(exchange, parallel)
        assert not made.groups and not mappings(), "several groups need neither"

        exchange.set_token_groups(1)
        one = outputs(exchange, parallel)
        mapped = mappings()
        assert len(made.groups) == 1 and mapped == buffers * 3, mapped
        assert not named_files()
        for number in (2, 1, 2, 1):
            exchange.set_token_groups(number)
            assert same(outputs(exchange, parallel), one if number == 1 else several)
        assert len(made.groups) == 1 and mappings() == mapped, "they are made once"
        if context.rank == 0:  # by itself: reading waits for nobody
            assert (exchange.token_groups, exchange.exchange_reason) == (1, way)

        exchange.close()
        assert not mappings() and not is_open(made.groups[0]) and is_open(exchange.groups.ep_group)
        with pytest.raises(RuntimeError, match="set_token_groups"):
            outputs(exchange, parallel)

        second = build_exchange(axes, tp_group, context.device, exchange=way)
        exchange.set_token_groups(1)
        assert same(outputs(second, parallel), one) and same(outputs(exchange, parallel), one)
        assert len(made.groups) == 3 and mappings() == 2 * mapped
        second.close()
        assert same(outputs(exchange, parallel), one)
        exchange.close()
        assert not mappings()
    mesh.stop()
    return "done"


@pytest.mark.parametrize("way", [pytest.param("direct", marks=pytest.mark.slow), "collectives"])
def test_an_exchange_makes_what_it_needs_once_and_gives_it_back(pool: Pool, way: str) -> None:
    assert pool.run(life, way, world=4) == ["done"] * 4
