"""Copies of parameters on several ranks: a bit that one of them has wrong names that rank, and ends a run in time."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.checkpoint.listing import all_checkpoints
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.parallel.replicas import bit_sum, copies
from mmtrain.train.step import train_step
from tests.dist.layouts import MODEL, SEQ, packed_row
from tests.dist.pool import Pool
from tests.dist.runs import SMALL, environment
from tests.dist.warm import run_script


def flip(x: torch.Tensor, place: int, bit: int) -> None:
    x.view(-1).view(torch.int32)[place] ^= 1 << bit


def found_after_flips(parallel: ParallelConfig, flips: list[tuple[int, int, int]]) -> tuple[int, list[tuple[int, str]]]:
    """Copies of parameters after a step, of which ranks have a bit wrong: how many have some, and who is odd."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, MODEL, [SEQ]))
    model = apply_parallel(meta_model(MODEL), context, parallel, torch.float32)
    model.initialise(7)
    optimizer = build_optimizer(model.module, OptimConfig())
    train_step(model, optimizer, [packed_row(context.dp_rank)], 1e-2, 1e4, clip_grad=1.0)
    assert model.odd_copies() == []
    shared = [one for _, _, some in copies(model.module) for one in some]
    for rank, place, bit in flips:
        if rank == context.rank:
            flip(shared[-1][1], place, bit)
    odd = model.odd_copies()
    mesh.stop()
    return len(shared), [(one.rank, one.name) for one in odd]


@pytest.mark.parametrize(
    ("tp", "flips", "expected"),
    [(4, [], []), (4, [(2, 0, 0)], [2]), (4, [(0, 31, 31)], [0]), (4, [(1, 3, 5), (3, 4, 5)], [1, 3]),
     (2, [(3, 1, 1)], [2, 3])],
)  # fmt: skip
def test_a_rank_with_a_bit_flipped_is_named(
    pool: Pool, tp: int, flips: list[tuple[int, int, int]], expected: list[int]
) -> None:
    """Where two ranks differ nobody knows which is right: both are named."""
    for count, odd in pool.run(found_after_flips, ParallelConfig(tp=tp), flips, world=4):
        assert count > 4 and [rank for rank, _ in odd] == expected
        assert len({name for _, name in odd}) <= 1


def test_without_copies_nothing_is_compared(pool: Pool) -> None:
    assert pool.run(found_after_flips, ParallelConfig(), [], world=2) == [(0, [])] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_changes_with_every_bit_and_with_the_order(dtype: torch.dtype) -> None:
    x = torch.randn(6, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = {int(bit_sum(x)), int(bit_sum(x.flip(0))), int(bit_sum(-x))}
    for byte in range(x.numel() * x.element_size()):
        for bit in range(8):
            other = x.clone()
            other.view(torch.uint8)[byte] ^= 1 << bit
            sums.add(int(bit_sum(other)))
    assert len(sums) == 3 + 8 * x.numel() * x.element_size()
    assert int(bit_sum(x[:0])) == 0 and int(bit_sum(x[::2])) == int(bit_sum(x[::2].contiguous()))


@pytest.mark.slow
@pytest.mark.parametrize("options", [["guard.copies_interval=3", "checkpoint.interval=2"], ["checkpoint.interval=4"]])
def test_a_run_ends_before_it_saves_what_a_faulty_device_computed(
    corpus: Path, tmp_path: Path, options: list[str]
) -> None:
    given = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=r", "parallel.tp=2", "checkpoint.keep=0",
             *options]  # fmt: skip
    told = {**environment(), "FLIP": "3:1"}  # in step 3, on rank 1
    done = run_script("tests/dist/flip_launcher.py", given, told, 2, timeout=300)
    assert done.returncode == 6, done.stderr[-3000:]
    host = socket.gethostname()
    assert f"rank 0 on {host} has other bits in its copy of " in done.stderr  # of two nobody knows which is right
    assert f"; rank 1 on {host} has other bits" in done.stderr and "take that machine out" in done.stderr
    assert len(all_checkpoints(tmp_path / "r/checkpoints")) == len(options) - 1
