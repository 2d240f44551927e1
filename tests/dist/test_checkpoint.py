"""Checkpoints of earlier versions: what is read from them, and what is refused by name, not by a traceback."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.load import load_for_decoding
from mmtrain.model.init import meta_model
from mmtrain.parallel import mesh
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.checkpoint.dcp import Progress, load_checkpoint, save_checkpoint
from mmtrain.optim.optimizer import build_optimizer
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
        path = save_checkpoint(folder, trained, moments, Progress(1, 64), config, rope_base=5e6)
        meta = json.loads((path / "meta.json").read_text())
        assert meta.pop("rope_base") == 5e6
        (path / "meta.json").write_text(json.dumps(meta))  # as the version before wrote it
        model, optimizer = build(context, 8)
        assert load_checkpoint(path, model, optimizer) == Progress(1, 64)
        for mine, theirs in zip(model.parameters(), trained.parameters(), strict=True):
            assert torch.equal(mine.full_tensor(), theirs.full_tensor())
            assert torch.equal(optimizer.state[mine]["exp_avg"].full_tensor(), moments.state[theirs]["exp_avg"].full_tensor())
    finally:
        mesh.stop()


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
    with pytest.raises(ConfigError, match="--rope-base=0.5: must be above 1"):
        load_for_decoding(tmp_path, "bytes", "cpu", 0.5)
    assert rope_base(load_for_decoding(tmp_path, "bytes", "cpu", 2e4)[0]) == 2e4
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "rope_base": 1e7}) + "\n")
    assert rope_base(load_for_decoding(tmp_path, "bytes", "cpu")[0]) == 1e7
    meta = tmp_path / "checkpoints/step-00000001/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"rope_base": 5e6}))  # as this version writes it
    assert rope_base(load_for_decoding(tmp_path, "bytes", "cpu")[0]) == 5e6


def rope_base(model: torch.nn.Module) -> float:
    return model.config.rope_base
