"""Ends of a run before its plan is done: steps that are not finite, signals, readers that go away."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtrain.build import meta_model
from mmtrain.checkpoint.listing import all_checkpoints
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.layouts import MODEL, SEQ, packed_row, whole
from tests.dist.pool import Pool
from tests.dist.runs import ROOT, SMALL, environment, pretrain, records, steps


class SpoiledLoss:
    """A loss that is wrong on one rank: its value alone, or its gradient with it."""

    def __init__(self, loss: Callable[..., Tensor], rank: int, gradient: bool) -> None:
        self.loss, self.rank, self.gradient = loss, rank, gradient

    def __call__(self, *args: object) -> Tensor:
        value = self.loss(*args)
        if torch.distributed.get_rank() != self.rank:
            return value
        return value * math.nan if self.gradient else value + math.inf


def spoiled_steps(parallel: ParallelConfig, gradient: bool) -> tuple[list, list[bool], list[bool]]:
    """A good step, one that rank 1 spoils, and one that rank 1 wants to be the last."""
    layout = plan_layout(mesh.world_size(), parallel, MODEL, [SEQ])
    context = mesh.start(ClusterConfig(device="cpu"), layout)
    model = apply_parallel(meta_model(MODEL), context, parallel, torch.float32)
    model.initialise(7)
    optimizer = build_optimizer(model.module, OptimConfig())
    good, weights, results = model.module.token_loss, [], []
    for spoils, stops in ((False, False), (True, False), (False, True)):
        model.module.token_loss = SpoiledLoss(good, 1, gradient) if spoils else good
        batches = [packed_row(context.dp_rank)]
        stop = stops and context.rank == 1
        results.append(train_step(model, optimizer, batches, 1e-2, 1e4, clip_grad=1.0, stop=lambda stop=stop: stop))
        fractions = [buffer.tolist() for name, buffer in model.module.named_buffers() if name.endswith("fractions_E")]
        weights.append((whole(model.module), [[float(s["step"]) for s in optimizer.state.values()], *fractions]))
    finite = model.weights_are_finite()
    if context.rank == 0:
        next(iter(model.module.parameters())).data.to_local().view(-1)[0] = math.inf
    now = model.weights_are_finite()
    mesh.stop()
    return weights, [result.skipped for result in results], [*(result.stop for result in results), finite, now]


GLOBAL = ParallelConfig(aux_loss_over="global_batch")  # whose fractions a skipped step must leave alone too


@pytest.mark.parametrize("parallel", [GLOBAL, pytest.param(ParallelConfig(tp=2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradient", [False, True])
def test_ranks_agree_on_a_step_that_one_of_them_spoils(pool: Pool, parallel: ParallelConfig, gradient: bool) -> None:
    for weights, skipped, flags in pool.run(spoiled_steps, parallel, gradient, world=2):
        assert skipped == [False, True, False]
        assert flags == [
            False,
            False,
            True,
            True,
            False,
        ]  # stop after each step; weights finite, then spoiled on rank 0
        (first, counted), (second, same), (third, moved) = weights
        assert all(torch.equal(first[name], second[name]) for name in first) and counted == same
        assert len(counted) == (5 if parallel is GLOBAL else 1) and moved != same
        assert any(not torch.equal(second[name], third[name]) for name in first)


def run_options(corpus: Path, folder: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "run.name=r", *more]


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(corpus: Path, tmp_path: Path) -> None:
    lr = "stage.phases.0.lr=[{kind: constant, tokens: 2048, end: 1e-3}, {kind: constant, tokens: 2048, end: 1e30}]"
    options = run_options(corpus, tmp_path, lr, "checkpoint.interval=2", "checkpoint.keep=1", "optim.max_skipped=2",
                          "checkpoint.asynchronous=false")  # fmt: skip
    done = pretrain(*options, processes=None, check=False)
    assert done.returncode == 4, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert (
        "stopped after step 7: loss or gradient of the last 2 steps was not finite" in last and "step-00000004" in last
    )
    assert "Traceback" not in done.stderr
    assert [path.name for path in all_checkpoints(tmp_path / "r/checkpoints")] == ["step-00000004"]
    skipped = [record for record in records(tmp_path / "r") if record.get("skipped")]
    assert [record["step"] for record in skipped] == [6, 7]
    assert [(record["first_row"], record["rows"]) for record in skipped] == [(40, 8), (48, 8)]
    assert last in (tmp_path / "r/log.txt").read_text()


def start(*options: str, processes: int | None = None) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen([*launcher, "launch/pretrain.py", *options], cwd=ROOT, env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)  # fmt: skip


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    for _ in range(2400):
        if (run / "metrics.jsonl").exists() and len(steps(run)) >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps in two minutes")


LONG = ["stage.token_scale=1000", "data.num_workers=1"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGUSR1))]
)
def test_a_signal_ends_a_run_after_a_save(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    options = run_options(corpus, tmp_path, *LONG)
    process = start(*options)
    wait_for_steps(tmp_path / "r", 2, process)
    for _ in range(3):  # as a terminal, Slurm and torchrun do: the loader's processes get it too, and more than once
        os.killpg(process.pid, number)
        time.sleep(0.1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, out
    done = steps(tmp_path / "r")[-1]["step"]
    assert f"stopped by {number.name} after step {done}" in out and "Traceback" not in out
    (saved,) = all_checkpoints(tmp_path / "r/checkpoints")
    assert json.loads((saved / "meta.json").read_text())["step"] == done
    pretrain(*options, "run.resume=auto", f"run.max_steps={done + 1}", processes=None)
    assert [row["step"] for row in steps(tmp_path / "r")] == list(range(1, done + 2))


@pytest.mark.slow
def test_all_ranks_stop_at_the_step_at_which_one_is_signalled(corpus: Path, tmp_path: Path) -> None:
    """torchrun hands its own signal to every rank; here one rank alone has it, as a node's preemption may do."""
    process = start(*run_options(corpus, tmp_path, *LONG), processes=2)
    wait_for_steps(tmp_path / "r", 2, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    done = steps(tmp_path / "r")[-1]["step"]
    (saved,) = all_checkpoints(tmp_path / "r/checkpoints")
    assert json.loads((saved / "meta.json").read_text())["step"] == done
    assert f"after step {done}" in out and "error on rank" not in out and "Traceback" not in out.partition("elastic")[0]


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(corpus: Path, tmp_path: Path) -> None:
    process = start(*run_options(corpus, tmp_path, "stage.token_scale=1000", "stage.phases.0.batch.0.tokens=400Ki"))
    while not (tmp_path / "r/log.txt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in out


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_a_run(corpus: Path, tmp_path: Path) -> None:
    options = run_options(corpus, tmp_path, "data.packing=best_fit")  # padding counts in no budget
    command = " ".join([sys.executable, "launch/pretrain.py", *(f"'{o}'" for o in options)])
    piped = ["bash", "-c", f"set -o pipefail; {command} 2>&1 | head -1"]
    subprocess.run(piped, cwd=ROOT, env=environment(), check=True, capture_output=True)
    done = steps(tmp_path / "r")
    assert done[-2]["tokens"] < 4096 <= done[-1]["tokens"] < len(done) * 512 and all_checkpoints(
        tmp_path / "r/checkpoints"
    )
    assert [row["first_row"] for row in done] == list(range(0, 8 * len(done), 8))
