"""Pipelines against one process: losses, every gradient, router figures, validation; checkpoints of another layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.checkpoint.progress import Progress, read_progress
from mmtrain.checkpoint.save import begin_save
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.parallel.pipeline.schedule import check_schedule
from mmtrain.train.evaluate import Validation, evaluate
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import train_step
from tests.dist.layouts import MODEL, SEQ, Job, packed_row, whole
from tests.dist.pool import Pool
from tests.dist.runs import SMALL, pretrain, records, steps
from tests.dist.test_layouts import SHALLOW, check

slow = pytest.mark.slow
LOOPED = {"pp_schedule": "interleaved", "pp_chunks": 2}
BUBBLE = {"pp_schedule": "zero_bubble"}
RECOMPUTED = {"activation_checkpoint": True}
# Model, options beside pp=2, rows, processes. A row is a micro-batch.
QUICK = {
    "3 layers": (replace(MODEL, num_layers=3), {}, 5, 2),
    "dense": (replace(SHALLOW, num_experts=0), {}, 4, 2),
    "interleaved": (MODEL, LOOPED, 4, 2),
    "zero bubble": (SHALLOW, BUBBLE, 4, 2),
    "zero bubble of two chunks": (MODEL, {**BUBBLE, "pp_chunks": 2}, 4, 2),
    "EP2": (SHALLOW, {"ep": 2}, 8, 4),
    "DP2, synchronised": (SHALLOW, {"sync_every_micro_batch": True}, 8, 4),
    "DP2, gathered once": (SHALLOW, {"reshard_after_forward": False}, 8, 4),
}
WIDE = {
    "TP2": (SHALLOW, {"tp": 2}, 4, 4),
    "as many micro-batches as stages": (SHALLOW, {}, 2, 2),
    "PP4": (MODEL, {"pp": 4}, 8, 4),
    "DP2, ZeRO-2, checkpointing": (SHALLOW, {**RECOMPUTED, "reshard_after_forward": False}, 8, 4),
    "ETP2": (SHALLOW, {"etp": 2}, 8, 4),
    "TP2, interleaved, checkpointing": (MODEL, {"tp": 2, **LOOPED, **RECOMPUTED}, 4, 4),
    "EP2, interleaved": (MODEL, {"ep": 2, **LOOPED}, 8, 4),
    "TP2, zero bubble": (SHALLOW, {"tp": 2, **BUBBLE}, 4, 4),
    "EP2, zero bubble": (SHALLOW, {"ep": 2, **BUBBLE}, 8, 4),
    "DP2, zero bubble of two chunks": (MODEL, {**BUBBLE, "pp_chunks": 2}, 8, 4),
    "TP2 x EP2 x ETP1": (SHALLOW, {"tp": 2, "ep": 2, **RECOMPUTED}, 8, 8),
    "EP4, interleaved": (MODEL, {"ep": 4, **LOOPED, **RECOMPUTED}, 16, 8),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=slow) for name in WIDE)])
def test_pipeline(pool: Pool, name: str) -> None:
    model, options, rows, world = {**QUICK, **WIDE}[name]
    count = 5 if name in WIDE else 2
    check(pool, Job(model, ParallelConfig(**{"pp": 2, **options}), rows=rows, steps=count), world)


def step_and_save(
    model_config: ModelConfig, parallel: ParallelConfig, folder: Path, resume: bool
) -> tuple[dict[str, torch.Tensor], StepResult, Validation]:
    """Start or resume, remember the weights, take a step, save if it was the first; then validate."""
    layout = plan_layout(mesh.world_size(), parallel, model_config, [SEQ])
    context = mesh.start(ClusterConfig(device="cpu"), layout)
    try:
        model = apply_parallel(meta_model(model_config), context, parallel, torch.float32)
        model.initialise(7)
        optimizer = build_optimizer(model.module, OptimConfig())
        if resume:
            load_checkpoint(folder / "step-00000001", model.module, optimizer)
            assert read_progress(folder / "step-00000001").tokens == 5
            weights = whole(model.module)
        batches = [packed_row(row) for row in range(4)]
        result = train_step(model, optimizer, batches, 1e-3, model_config.rope_base, clip_grad=1.0)
        if not resume:
            begin_save(folder, model.module, optimizer, Progress(1, 5), {}, model_config.rope_base).finish()
            weights = whole(model.module)
        held_out = [(packed_row(row), row < 12) for row in range(10, 13)]
        return weights, result, evaluate(model, held_out, np.ones(101), model_config.rope_base)
    finally:
        mesh.stop()


@pytest.mark.parametrize("options", [{}, LOOPED], ids=["1f1b", "interleaved"])
def test_another_layout_goes_on_from_a_checkpoint(pool: Pool, tmp_path: Path, options: dict[str, object]) -> None:
    """Bitwise the weights, and the moments, as the next step shows; validation is the same under any layout."""
    piped, alone = ParallelConfig(pp=2, **options), ParallelConfig()
    saved = pool.run(step_and_save, MODEL, piped, tmp_path, False, world=2)
    merged = {name: weight for weights, _, _ in saved for name, weight in weights.items()}
    one = pool.run(step_and_save, MODEL, alone, tmp_path, True, world=1)[0]
    assert merged.keys() == one[0].keys()
    assert all(torch.equal(weight, one[0][name]) for name, weight in merged.items())
    for weights, result, validation in pool.run(step_and_save, MODEL, piped, tmp_path, True, world=2):
        assert all(torch.equal(weight, one[0][name]) for name, weight in weights.items())
        assert result.loss == pytest.approx(one[1].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(one[1].grad_norm, rel=1e-5)
        assert validation.loss == pytest.approx(one[2].loss, rel=1e-5)
        assert validation.bits_per_byte == pytest.approx(one[2].bits_per_byte, rel=1e-5)


@slow
def test_a_run_with_a_pipeline_is_the_run_without(corpus: Path, tmp_path: Path) -> None:
    """Through the trainer: losses, validation, a resume, and text generated from the checkpoint."""
    common = [*SMALL, "model.num_layers=4", "model.layer_pattern=LLLS", f"data.path={corpus}", f"run.dir={tmp_path}"]
    pretrain(*common, "run.name=one", processes=1)
    piped = [*common, "run.name=piped", "parallel.pp=2", "parallel.pp_schedule=interleaved", "parallel.pp_chunks=2"]
    pretrain(*piped, "run.max_steps=3", processes=2)
    pretrain(*piped, "run.resume=auto", processes=2)
    for mine, theirs in zip(steps(tmp_path / "piped"), steps(tmp_path / "one"), strict=True):
        for key in ("loss", "aux_loss", "grad_norm", "drop_rate"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5), (key, mine["step"])
    mine, theirs = records(tmp_path / "piped")[-1], records(tmp_path / "one")[-1]
    assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=2e-5)
    refused = pretrain(*common, "run.name=no", "parallel.pp=2", "stage.phases.0.batch.0.tokens=64", processes=2,
                       check=False)  # fmt: skip
    assert refused.returncode != 0 and "1 micro-batches a rank do not fill" in refused.stderr


def test_schedules_that_cannot_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 micro-batches a rank do not fill"):
        check_schedule(ParallelConfig(pp=4), "stage", 3, 3)
    with pytest.raises(ConfigError, match="5 micro-batches a rank cannot be run in 2 equal rounds"):
        check_schedule(ParallelConfig(pp=2, **LOOPED), "stage", 5, 5)
    with pytest.raises(ConfigError, match="activation_checkpoint"):
        ParallelConfig(pp=2, **BUBBLE, **RECOMPUTED).validate()
    check_schedule(ParallelConfig(pp=2), "stage", 5, 5)
