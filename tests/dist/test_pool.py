"""The pool of workers: order, reuse, failures."""

from __future__ import annotations

import errno
import gc
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from tests.dist.layouts import MODEL, SEQ
from tests.dist.pool import Pool, WorkerError


def add_ranks(scale_1: torch.Tensor, stop: bool) -> tuple[int, torch.Tensor, int]:
    """This rank, the scaled sum of all ranks, and the process; without `stop` the group is left to the worker."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    total_1 = scale_1 * rank
    dist.all_reduce(total_1)
    if stop:
        dist.destroy_process_group()
    return rank, total_1, os.getpid()


def raise_on(rank: int) -> None:
    """The other ranks wait for the one that raises."""
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError("wrong on purpose")
    dist.barrier()


def hang_on(rank: int) -> int:
    mine = int(os.environ["RANK"])
    if mine == rank:
        time.sleep(1000)
    return mine


def die_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os._exit(3)


def port_in_use() -> str:
    """What it means to serve the ranks' port oneself."""
    with socket.socket() as mine:
        try:
            mine.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        except OSError as error:
            return errno.errorcode[error.errno]
    return "nobody serves it"


def check(pool: Pool, world: int, stop: bool = True) -> list[int]:
    """Run `add_ranks` and return the process of every rank."""
    results = pool.run(add_ranks, torch.tensor([0.5]), stop, world=world)
    assert [rank for rank, _, _ in results] == list(range(world))
    assert all(total_1.item() == 0.5 * sum(range(world)) for _, total_1, _ in results)
    return [process for _, _, process in results]


def test_workers_are_reused_whatever_the_world(pool: Pool) -> None:
    two, four, again = check(pool, 2), check(pool, 4, stop=False), check(pool, 2, stop=False)
    assert four[:2] == two == again and len({*four, os.getpid()}) == 5


def test_an_exception_shows_where_it_was_raised_and_spares_those_who_answer(pool: Pool) -> None:
    before = check(pool, 2)
    with pytest.raises(WorkerError, match=r"^rank 1 of 2: Traceback(.|\n)*in raise_on(.|\n)*wrong on purpose"):
        pool.run(raise_on, 1, world=2)
    assert check(pool, 2)[1] == before[1]


def test_a_rank_that_hangs_is_named_and_replaced(pool: Pool) -> None:
    before = check(pool, 2)
    with pytest.raises(WorkerError, match=r"^no answer within 5 s from ranks \[1\] of 2: stopped\n") as caught:
        pool.run(hang_on, 1, world=2, timeout=5)
    _, _, stood = str(caught.value).partition("rank 1 of 2 used 0.")
    assert f"line {hang_on.__code__.co_firstlineno + 3} in hang_on" in stood, "the stacks do not say where it hung"
    after = check(pool, 2)
    assert after[0] == before[0] and after[1] != before[1]


def test_a_rank_that_dies_is_named_and_replaced(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="rank 0 of 2: the process ended with exit code 3"):
        pool.run(die_on, 0, world=2)
    check(pool, 2)


def laid_out() -> tuple[int, int]:
    """Threads of gloo under a layout whose groups are megatron-core's too, and after it was left."""
    layout = plan_layout(mesh.world_size(), ParallelConfig(tp=2), MODEL, [SEQ])
    mesh.start(ClusterConfig(device="cpu"), layout)
    during = gloo_threads()
    mesh.stop()
    gc.collect()  # meshes refer to themselves
    return during, gloo_threads()


class LateStore(dist.Store):
    """A rank's store that answers late when the addresses of a group's ranks are asked for."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store = store

    def get(self, key: str) -> bytes:
        time.sleep(0.1)
        return self._store.get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        time.sleep(0.1)
        return self._store.multi_get(keys)


def _hand_on(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self._store, name)(*args)


for _name in ("set", "add", "check", "wait", "has_extended_api", "append", "multi_set", "set_timeout"):
    setattr(LateStore, _name, _hand_on(_name))  # torch calls what a subclass defines itself


def laid_out_slowly_on(rank: int) -> None:
    """One rank connects late within each group; the others have nothing to do and leave."""
    world = mesh.join(ClusterConfig(device="cpu"))
    if int(os.environ["RANK"]) == rank:
        world = replace(world, store=LateStore(world.store))
    world.lay_out(plan_layout(mesh.world_size(), ParallelConfig(ep=4), MODEL, [SEQ]))
    mesh.stop()


def gloo_threads() -> int:
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def test_no_thread_of_a_layout_outlives_it(pool: Pool) -> None:
    """They wear a machine down: hundreds of them took more of two cores than the tests."""
    for during, after in pool.run(laid_out, world=2):
        assert after < during / 5  # megatron-core keeps two groups: 6 of 66 threads (60 without stop)


@pytest.mark.parametrize("slow", [0, 3, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 2))])
def test_no_rank_leaves_before_all_have_met(pool: Pool, slow: int) -> None:
    """Else a slow one finds connections closed that it is about to use."""
    pool.run(laid_out_slowly_on, slow, world=4)


def test_a_world_larger_than_the_pool_is_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="world=9"):
        pool.run(hang_on, 0, world=9)


def test_the_port_is_held_before_a_rank_asks_for_it(pool: Pool) -> None:
    """Else another pool on the machine may take it: ranks would meet in that pool's store, and hang."""
    assert pool.run(port_in_use, world=2) == ["EADDRINUSE"] * 2
