"""Checkpoints that are written beside the steps: they hold what was there when they began, and cost no step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mmtrain.build import meta_model
from mmtrain.checkpoint import staging
from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.manifest import file_sum, read_manifest
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.rank_writer import RankWriter
from mmtrain.checkpoint.save import PendingSave, begin_save, most_bytes, state_of
from mmtrain.checkpoint.staging import StagingBuffer
from mmtrain.checkpoint.tensors import StoredTensors
from mmtrain.checkpoint.verify import damage_of_tensors
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.layouts import MODEL
from tests.dist.pool import Pool
from tests.dist.runs import SMALL, pretrain, records, steps
from tests.dist.test_sharding import batch, model_config
from tests.model.small import small_model


def trained(context: mesh.ParallelContext, parallel: ParallelConfig) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with moments that are not zero, and with a buffer that a step changes before its optimizer does."""
    model = apply_parallel(meta_model(MODEL), context, parallel, torch.float32)
    model.initialise(7)
    model.module.register_buffer("fractions", torch.arange(40_000.0))
    optimizer = build_optimizer(model.module, OptimConfig())
    spoil(model.module)
    step(model.module, optimizer)
    return model.module, optimizer


def spoil(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()


def begin(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int, copy: StagingBuffer
          ) -> PendingSave:  # fmt: skip
    return begin_save(folder, model, optimizer, Progress(number, 64), {"model": {}}, 5e6, copy=copy)


def slow(call: Callable, seconds: float) -> Callable:
    def slowed(self: object, *given: object) -> object:
        time.sleep(seconds)
        return call(self, *given)

    return slowed


def save_beside_a_step(folder: Path, parallel: ParallelConfig) -> tuple[float, bool]:
    """Save and wait; save beside a step whose copy is slow, and whose writing ends after the step."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        model, optimizer = trained(context, parallel)
        begin_save(folder / "whole", model, optimizer, Progress(1, 64), {"model": {}}, 5e6).finish()
        copy, stepped = StagingBuffer(context.device), threading.Event()
        copy.reserve(most_bytes(model))
        reserved, write = copy._buffer, RankWriter.write

        def late(self: RankWriter, tensors: list[torch.Tensor]) -> object:
            assert stepped.wait(60)
            return write(self, tensors)

        with (
            mock.patch.object(staging, "_SMALL", 0),  # these parameters would be copied at once
            mock.patch.object(StagingBuffer, "finish", slow(StagingBuffer.finish, 0.3)),
            mock.patch.object(RankWriter, "write", late),
        ):
            pending = begin(folder / "beside", model, optimizer, 1, copy)
            assert copy._buffer is reserved  # the steps do not wait for any more memory
            model.fractions.zero_()  # as the step's end does it
            spoil(model)
            began = time.perf_counter()
            pending.let_go()
            waited = time.perf_counter() - began
            step(model, optimizer)
            writing = pending.is_writing
            stepped.set()
            pending.finish()
        begin(folder / "after", model, optimizer, 1, copy).finish()  # in the same memory
        begin_save(folder / "after_whole", model, optimizer, Progress(1, 64), {"model": {}}, 5e6).finish()
        return waited, writing and not pending.is_writing
    finally:
        mesh.stop()


def save_again_and_again(folder: Path, parallel: ParallelConfig) -> list[int]:
    """Save by a writer that keeps its plan and by a new one after each change; whether the former planned each time."""
    context = mesh.start(ClusterConfig(device="cpu"))

    def forget(writer: RankWriter) -> None:
        if context.rank == 1:  # the others would go on by a plan that does not fit there
            writer._known = None

    try:
        model, optimizer = trained(context, parallel)
        changes: dict[str, Callable[[RankWriter], object]] = {
            "first": lambda writer: None,
            "stepped": lambda writer: (spoil(model), step(model, optimizer)),
            "rate": lambda writer: [group.update(lr=0.01 * i + 0.01) for i, group in enumerate(optimizer.param_groups)],
            "one rank": forget,
            "more": lambda writer: model.register_buffer("scale", torch.arange(8.0)),
            "longer": lambda writer: model.register_buffer("scale", torch.arange(9.0)),
        }
        kept, planned = RankWriter(), []
        for name, change in changes.items():
            change(kept)
            with mock.patch("torch.distributed.checkpoint.save", side_effect=dcp.save) as plan:
                given = (model, optimizer, Progress(1, 64), {"model": {}}, 5e6)
                begin_save(folder / name / "kept", *given, writer=kept).finish()
                planned.append(plan.call_count)
            begin_save(folder / name / "new", *given).finish()
        return planned
    finally:
        mesh.stop()


@pytest.mark.parametrize("options", [{}, {"pp": 2}])
def test_a_plan_is_kept_as_long_as_it_fits(pool: Pool, tmp_path: Path, options: dict[str, int]) -> None:
    assert pool.run(save_again_and_again, tmp_path, ParallelConfig(**options), world=2) == [[1, 0, 0, 1, 1, 1]] * 2
    before = None
    for folder in sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        kept, new = (folder / name / "step-00000001" for name in ("kept", "new"))
        assert damage_of(kept) is None and damage_of_tensors(kept) is None
        assert read_manifest(kept).files == read_manifest(new).files != before
        before = read_manifest(kept).files if folder.name != "rate" else None  # "one rank" changes nothing


@pytest.mark.parametrize("options", [{}, {"tp": 2}, {"pp": 2}, {"ep": 2}])
def test_a_checkpoint_holds_what_was_there_when_it_began(pool: Pool, tmp_path: Path, options: dict[str, int]) -> None:
    for waited, was_beside in pool.run(save_beside_a_step, tmp_path, ParallelConfig(**options), world=2):
        assert was_beside and waited > 0.1
    paths = {name: tmp_path / name / "step-00000001" for name in ("whole", "beside", "after", "after_whole")}
    assert all(damage_of(path) is None and damage_of_tensors(path) is None for path in paths.values())
    sums = {name: read_manifest(path).files for name, path in paths.items()}
    assert sums["whole"] == sums["beside"] and sums["after"] == sums["after_whole"]
    assert sums["whole"] != sums["after"]
    stored = StoredTensors(paths["beside"])
    assert torch.equal(stored.whole("model.fractions"), torch.arange(40_000.0))
    moments = [name for name in stored.shapes if name.endswith(".exp_avg")]
    assert moments and all(stored.whole(name).abs().min() > 0 for name in moments)


@pytest.mark.slow
def test_a_run_that_saves_beside_its_steps_is_the_run_that_waits(corpus: Path, tmp_path: Path) -> None:
    """Every checkpoint to the last bit, and the records; the ends of writing fall where they may."""
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "checkpoint.interval=2", "checkpoint.keep=0"]
    pretrain(*common, "run.name=beside", processes=2)
    pretrain(*common, "run.name=waits", "checkpoint.asynchronous=false", processes=2)
    folders = [sorted((tmp_path / name / "checkpoints").iterdir()) for name in ("beside", "waits")]
    assert [path.name for path in folders[0]] == [path.name for path in folders[1]] and len(folders[0]) == 4
    for mine, theirs in zip(*folders, strict=True):
        for name in ("rank-00000.safetensors", "rank-00001.safetensors", "tensors.json"):
            assert file_sum(mine / name) == file_sum(theirs / name)
    for mine, theirs in zip(steps(tmp_path / "beside"), steps(tmp_path / "waits"), strict=True):
        assert mine["loss"] == theirs["loss"] and mine["grad_norm"] == theirs["grad_norm"]
    assert records(tmp_path / "beside")[-1]["val_loss"] == records(tmp_path / "waits")[-1]["val_loss"]


def test_memory_that_is_there_before_the_steps_is_enough_for_a_copy() -> None:
    model = small_model(num_experts=4, top_k=2)
    optimizer = build_optimizer(model, OptimConfig())
    spoil(model)
    step(model, optimizer)
    copied = [value for one in state_of(model, optimizer) for value in one.values() if isinstance(value, torch.Tensor)]
    needed = sum(tensor.nbytes for tensor in copied)
    assert len(copied) > 4 * len(list(model.parameters())) - 1 and needed <= most_bytes(model) <= needed * 1.05


class Reader:
    """A checkpoint that this rank still writes, or does not, and the weights as they were when it let go."""

    def __init__(self, is_writing: bool, model: torch.nn.Module) -> None:
        self.is_writing, self.model = is_writing, model
        self.seen: list[torch.Tensor] = []

    def let_go(self) -> None:
        self.seen = [parameter.detach().full_tensor().clone() for parameter in self.model.parameters()]


def step_beside(writers: list[int]) -> tuple[bool, bool, bool]:
    """A step while some ranks write: what it says of that, and whether weights changed only after they let go."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        laid = apply_parallel(meta_model(model_config()), context, ParallelConfig(), torch.float32)
        laid.initialise(7)
        optimizer = build_optimizer(laid.module, OptimConfig())
        start = [parameter.detach().full_tensor().clone() for parameter in laid.module.parameters()]
        reader = Reader(context.rank in writers, laid.module)
        result = train_step(laid, optimizer, [batch(context.rank)], 1e-2, 1e4, clip_grad=1.0, saving=reader)
        end = [parameter.detach().full_tensor() for parameter in laid.module.parameters()]
        same = all(map(torch.equal, start, reader.seen)) and len(start) == len(reader.seen)
        return result.writing, same, any(not torch.equal(*pair) for pair in zip(start, end, strict=True))
    finally:
        mesh.stop()


@pytest.mark.parametrize("writers", [[], [1], [0, 1]], ids=str)
def test_all_ranks_know_whether_one_writes_and_weights_change_when_all_let_go(pool: Pool, writers: list[int]) -> None:
    assert pool.run(step_beside, writers, world=2) == [(bool(writers), True, True)] * 2
