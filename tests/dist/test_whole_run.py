"""Runs through the trainer, seen from outside: validation and what it leaves behind, and moments of another run."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdata.rows.loader import micro_batches
from mmtrain.build import build_model, meta_model
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.config import ClusterConfig, ParallelConfig, PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.infer.load import load_for_decoding
from mmtrain.model.packed_seq import Packing
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.inputs import RunInputs
from tests.dist.pool import Pool
from tests.dist.runs import ROOT, SMALL, records, steps

BASE = 20.0  # far from the model's own, so that 64 positions tell them apart
BOTH = ("step", "loss", "aux_loss", "grad_norm", "drop_rate")


def configuration(corpus: Path, folder: Path, *overrides: str) -> PretrainConfig:
    options = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "model.capacity_factor=0.6",
               f"stage.phases.0.rope_base={BASE}", *overrides]  # fmt: skip
    return compose(options, ROOT / "configs")


def train(*configs: PretrainConfig) -> None:
    """Run them one after another in this process, as launch/pretrain.py does."""
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "launch" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for config in configs:
        module.pretrain(config)


@pytest.fixture(scope="module")
def validated(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, Path]:
    """Three steps, validated after each, and beside it the same without a validation."""
    folder = tmp_path_factory.mktemp("validated")
    often = configuration(corpus, folder, "run.name=often", "run.max_steps=3", "log.valid_interval=1",
                          "log.gradient_fingerprints=true", "optim.clip_grad=0.01")  # fmt: skip
    never = configuration(corpus, folder, "run.name=never", "run.max_steps=3", "data.valid_rows=0",
                          "optim.clip_grad=0.01")  # fmt: skip
    pool.run(train, often, never, world=1)
    return often, folder


def test_training_after_a_validation_is_training_without_one(validated: tuple[PretrainConfig, Path]) -> None:
    often, never = ([[record[key] for key in BOTH] for record in steps(validated[1] / name)]
                    for name in ("often", "never"))  # fmt: skip
    assert often == never and len(often) == 3
    assert all(record["drop_rate"] > 0.05 for record in steps(validated[1] / "often"))
    assert sum("val_loss" in record for record in records(validated[1] / "often")) == 3


def test_the_first_step_is_trained_with_the_phase_s_rope_base(validated: tuple[PretrainConfig, Path]) -> None:
    """The loss of a plain model's logits, over the first batch's rows, each of which is a micro-batch."""
    config, folder = validated
    model = build_model(config.model, seed=config.run.seed).train()
    stream = RunInputs(config.data, config.stage.phases, config.model.vocab_size).train_stream(0)
    rows = steps(folder / "often")[0]["rows"]

    def loss(base: float) -> float:
        nats, count = 0.0, 0
        for batch in micro_batches(stream, [[row] for row in range(rows)]):
            packing = Packing(batch.cu_seqlens, batch.position_ids_BS.flatten(), batch.max_seqlen)
            mask = batch.loss_mask_BS.flatten()
            with torch.no_grad():
                logits = model(batch.tokens_BS.flatten(), packing, rope_base=base).double()[mask]
            nats += F.cross_entropy(logits, batch.labels_BS.flatten()[mask], reduction="sum").item()
            count += int(mask.sum())
        return nats / count

    recorded = steps(folder / "often")[0]["loss"]
    assert recorded == pytest.approx(loss(BASE), rel=1e-6)
    assert recorded != pytest.approx(loss(config.model.rope_base), rel=1e-5)


def by_hand(config: PretrainConfig, run: Path, training: bool) -> tuple[float, float]:
    """Nats a token and bits a byte of the held-out rows, from the saved weights' logits in float64."""
    model, tokenizer = load_for_decoding(run, "bytes", "cpu")
    if training:  # what is loaded is in evaluation mode
        model.train()
    stream = RunInputs(config.data, config.stage.phases, config.model.vocab_size).valid_stream(64)
    nats, labels = 0.0, []
    for batch in micro_batches(stream, [[row] for row in range(config.data.valid_rows)]):
        mask = batch.loss_mask_BS.flatten()
        packing = Packing(batch.cu_seqlens, batch.position_ids_BS.flatten(), batch.max_seqlen)
        with torch.no_grad():
            logits = model(batch.tokens_BS.flatten(), packing).double()[mask]
        labels.append(batch.labels_BS.flatten()[mask])
        nats += F.cross_entropy(logits, labels[-1], reduction="sum").item()
    ids = torch.cat(labels).numpy()
    assert tokenizer.eod_id == 256
    return nats / ids.size, nats * math.log2(math.e) / np.count_nonzero(ids < 256)  # a token of text is a byte


def test_validation_is_the_dropless_loss_of_the_saved_weights(validated: tuple[PretrainConfig, Path]) -> None:
    config, folder = validated
    last = [record for record in records(folder / "often") if "val_loss" in record][-1]
    loss, bits = by_hand(config, folder / "often", training=False)
    assert last["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert last["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert by_hand(config, folder / "often", training=True)[0] != pytest.approx(loss, rel=1e-4)


def test_fingerprints_are_of_the_first_step_before_clipping(validated: tuple[PretrainConfig, Path]) -> None:
    _, folder = validated
    found = json.loads((folder / "often" / "gradients.json").read_text())
    assert found["precision"] == "float32" and not (folder / "never" / "gradients.json").exists()
    norm = math.hypot(*(row[0] for row in found["parameters"].values()))
    assert norm == pytest.approx(steps(folder / "often")[0]["grad_norm"], rel=1e-6)
    assert norm > 0.1  # far above clip_grad


def first_moments(config: PretrainConfig, runs: list[Path]) -> list[dict[str, torch.Tensor]]:
    context, found = mesh.start(ClusterConfig(device="cpu")), []
    try:
        for run in runs:
            model = apply_parallel(meta_model(config.model), context, ParallelConfig(), torch.float32)
            model.initialise(1)
            optimizer = build_optimizer(model.module, config.optim)
            load_checkpoint(max((run / "checkpoints").glob("step-*")), model.module, optimizer)
            found.append({name: optimizer.state[parameter]["exp_avg"].full_tensor()
                          for name, parameter in model.module.named_parameters()})  # fmt: skip
        return found
    finally:
        mesh.stop()


@pytest.mark.slow
def test_moments_of_another_run_arrive_unless_they_are_not_wanted(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """A first step's moments are beta1 times what it began with, and the rest its gradient, which is the same."""
    common = ["run.max_steps=1", f"run.init_from={tmp_path}/first"]
    configs = [
        configuration(corpus, tmp_path, "run.name=first", "run.max_steps=2"),
        configuration(corpus, tmp_path, "run.name=with", *common),
        configuration(corpus, tmp_path, "run.name=without", *common, "run.init_optimizer=false"),
    ]
    pool.run(train, configs[0], world=1)
    pool.run(train, *configs[1:], world=1)
    runs = [tmp_path / name for name in ("first", "with", "without")]
    before, with_them, without = pool.run(first_moments, configs[0], runs, world=1)[0]
    for name, moment in with_them.items():
        expected = configs[0].optim.beta1 * before[name] + without[name]
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-9, msg=name)
        assert (moment - without[name]).norm() > 0.1 * without[name].norm(), name
