"""Checkpoints of earlier versions: what is read from them, and what is refused by name, not by a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from mmtrain.build import meta_model
from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.checkpoint.lock import RunLock
from mmtrain.checkpoint.progress import Progress, read_progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.checkpoint.save import BY_PARAMETER, SaveFailed, begin_save
from mmtrain.checkpoint.staging import StagingBuffer
from mmtrain.checkpoint.verify import damage_of_tensors
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.load import load_for_decoding
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.parallelize import apply_parallel
from tests.checkpoint.fake import config
from tests.dist.layouts import MODEL
from tests.dist.pool import Pool, WorkerError


def load_by_group(folder: Path) -> None:
    """Save the optimizer's options by group, as earlier versions did, and load that."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        model = apply_parallel(meta_model(MODEL), context, ParallelConfig(), torch.float32)
        model.initialise(7)
        optimizer = build_optimizer(model.module, OptimConfig())
        weights, moments = get_state_dict(model.module, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        load_checkpoint(folder, model.module, optimizer)
    finally:
        mesh.stop()


def test_another_form_of_the_optimizer_s_state_is_refused(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"ConfigError: run\.resume=.*in another form.*run\.init_optimizer=false"):
        pool.run(load_by_group, tmp_path / "old", world=1)


MODEL = replace(MODEL, vocab_size=257)  # has room for the byte tokenizer


def save_and_load(folder: Path, config: dict) -> None:
    """Save a model that was trained for one step, and load it, with its moments, into another of other weights."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        trained, moments = build(context, 7)
        for parameter in trained.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        moments.step()
        path = begin_save(folder, trained, moments, Progress(1, 64), config, rope_base=5e6).finish()
        meta = json.loads((path / "meta.json").read_text())
        assert meta.pop("rope_base") == 5e6
        make_old(path, trained, moments, {name: value for name, value in meta.items() if name != "format"})
        model, optimizer = build(context, 8)
        load_checkpoint(path, model, optimizer)
        assert read_progress(path) == Progress(1, 64)
        for mine, theirs in zip(model.parameters(), trained.parameters(), strict=True):
            assert torch.equal(mine.full_tensor(), theirs.full_tensor())
            assert torch.equal(
                optimizer.state[mine]["exp_avg"].full_tensor(), moments.state[theirs]["exp_avg"].full_tensor()
            )
    finally:
        mesh.stop()


def make_old(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, meta: dict) -> None:
    """Make a checkpoint of one as the first versions wrote it: by torch, without format and checksums."""
    shutil.rmtree(path)
    weights, moments = get_state_dict(model, optimizer, options=BY_PARAMETER)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=path)
    (path / "meta.json").write_text(json.dumps(meta))


def build(context: mesh.ParallelContext, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = apply_parallel(meta_model(MODEL), context, ParallelConfig(), torch.float32)
    model.initialise(seed)
    return model.module, build_optimizer(model.module, OptimConfig())


def test_a_checkpoint_without_a_rope_base_resumes_and_decodes(pool: Pool, tmp_path: Path) -> None:
    phases = [{"rope_base": 1e4}, {"rope_base": 1e7}]
    config = {"model": asdict(MODEL), "data": {"path": "gone"}, "stage": {"phases": phases}}
    pool.run(save_and_load, tmp_path / "checkpoints", config, world=1)
    with pytest.raises(ConfigError, match="--rope-base"):
        load_for_decoding(tmp_path, "bytes", "cpu")
    with pytest.raises(ConfigError, match=r"--rope-base=0\.5: must be above 1"):
        load_for_decoding(tmp_path, "bytes", "cpu", 0.5)
    assert rope_base(load_for_decoding(tmp_path, "bytes", "cpu", 2e4)[0]) == 2e4
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "rope_base": 1e7}) + "\n")
    assert rope_base(load_for_decoding(tmp_path, "bytes", "cpu")[0]) == 1e7
    meta = tmp_path / "checkpoints/step-00000001/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"rope_base": 5e6}))  # as this version writes it
    assert rope_base(load_for_decoding(tmp_path, "bytes", "cpu")[0]) == 5e6


def rope_base(model: torch.nn.Module) -> float:
    return model.config.rope_base


def lock_and_refuse(folder: Path) -> str:
    """Two ranks of a launch whose run folder another one holds."""
    mesh.start(ClusterConfig(device="cpu"))
    try:
        with RunFolder(config(folder)).locked(lambda line: None):
            return "held"
    except ConfigError as error:
        return str(error)
    finally:
        mesh.stop()


def test_every_rank_learns_who_holds_the_run(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(lock_and_refuse, tmp_path, world=2) == ["held", "held"]
    with RunLock(tmp_path / "r", pytest.fail):
        lines = pool.run(lock_and_refuse, tmp_path, world=2)
    assert lines[0] == lines[1] and f"another launch of this run is at work (pid {os.getpid()} on " in lines[0]


def save_without_room(folder: Path, full_rank: int, file: str, beside: bool) -> list[str]:
    """Save three times, in a thread or not; at the second, one rank has no room for its shard or its metadata."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        model, optimizer = build(context, 7)
        sync, copy = os.fsync, StagingBuffer(context.device) if beside else None

        def full(handle: int) -> None:
            if context.rank == full_rank and file in os.readlink(f"/proc/self/fd/{handle}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        told = []
        for step in (1, 2, 3):
            with mock.patch.object(os, "fsync", full if step == 2 else sync):
                try:
                    at = Progress(step, 64 * step)
                    begin_save(folder, model, optimizer, at, {"model": {}}, rope_base=5e6, copy=copy).finish()
                except SaveFailed as error:
                    told.append(str(error))
        return told
    finally:
        mesh.stop()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("full_rank", "file"), [(1, "rank-00001"), (0, "tensors.json"), (0, "meta.json"), (0, "manifest.json")]
)
def test_a_full_disk_of_one_rank_costs_all_that_checkpoint_only(
    pool: Pool, tmp_path: Path, full_rank: int, file: str, beside: bool
) -> None:
    told = pool.run(save_without_room, tmp_path, full_rank, file, beside, world=2)
    line = f"{tmp_path}/step-00000002 could not be written: No space left on device (rank {full_rank})"
    assert told == [[line], [line]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert all(damage_of(path) is None and damage_of_tensors(path) is None for path in tmp_path.iterdir())


def load_garbage(folder: Path, shard: str) -> str:
    """Save on two ranks, cut a shard short, and load."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        model, optimizer = build(context, 7)
        path = begin_save(folder, model, optimizer, Progress(1, 64), {"model": {}}, rope_base=5e6).finish()
        if context.rank == 0:
            os.truncate(path / shard, 4096)
        dist.barrier()
        load_checkpoint(path, model, optimizer)
        return "loaded"
    except ConfigError as error:
        return str(error)
    finally:
        mesh.stop()


def test_a_spoilt_shard_is_told_in_a_line_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    lines = pool.run(load_garbage, tmp_path, "rank-00001.safetensors", world=2)
    assert lines[0] == lines[1] and lines[0].startswith(f"run.resume={tmp_path}/step-00000001: cannot be read: ")
    assert "\n" not in lines[0]
