"""Warnings on stages, and the warm-up that a scaled stage keeps."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from mmtrain.checkpoint.progress import Progress
from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.stage_warnings import stage_warnings, trained_length

CONFIGS = Path(__file__).parents[2] / "configs"


def config(*overrides: str) -> PretrainConfig:
    return compose(["run.name=a", "data.path=b", *overrides], CONFIGS)


def warnings(*overrides: str, trained: int | None = None, base: float | None = None) -> list[str]:
    made = config(*overrides)
    return stage_warnings(made, scaled_phases(made.stage), trained, base)


@pytest.mark.parametrize("stage", ["pretrain", "long_ctx", "quickstart"])
@pytest.mark.parametrize("scales", [[], ["stage.scale=1/16", "stage.batch_scale=1/8"], ["stage.scale=0.01"]])
def test_stages_as_they_are_written_warn_of_nothing(stage: str, scales: list[str]) -> None:
    assert warnings(f"stage={stage}", *scales) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["log.valid_interval=100"], ""),
        (["log.valid_interval=50"], ""),
        (["log.valid_interval=0", "checkpoint.keep_best=0"], ""),
        (["log.valid_interval=0", "checkpoint.keep=0"], ""),
        ([], "before the end (log.valid_interval=0), so that none is known to be the best; give log.valid_interval="),
        (["log.valid_interval=10", "data.valid_rows=0"], "(data.valid_rows=0), so that none is known to be the best; "
         "give log.valid_interval=100 and data.valid_rows above 0"),
        (["log.valid_interval=200"], "every 100 steps and a held-out loss every 200 (log.valid_interval), both only "
         "every 200; give log.valid_interval=100"),
        (["log.valid_interval=30"], "both only every 300"),
    ],
)  # fmt: skip
def test_the_best_are_kept_where_a_loss_is_measured(given: list[str], expected: str) -> None:
    found = warnings("stage=quickstart", "checkpoint.interval=100", "checkpoint.keep_best=2", *given)
    assert len(found) == bool(expected) and all(line.startswith("checkpoint.keep_best=2: ") for line in found)
    assert all(expected in line for line in found)


QUICK, LR, BATCH = "stage=quickstart", "stage.phases[0].lr", "stage.phases[0].batch"
Q_TOKENS = 960 * 1024


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{LR}[0].tokens=8Ki"],
         f"{LR}[0].tokens=8192: a warm-up of 1 step, the first of 8192 tokens at lr 0.002; lengthen it"),
        ([f"{LR}[0].tokens=8Ki"],
         f"{LR}: its segments end at 827392 of 983040 tokens; the last value 0.0002 holds on from there"),
        ([f"{LR}[0].tokens=32Ki"],
         f"{LR}[0].tokens=32768: a warm-up of 4 steps, the first of 8192 tokens at lr 0.0005; lengthen it"),
        ([f"{LR}[1].tokens=792Ki"], f"{LR}: its segments end at 974848 of 983040 tokens"),
        ([f"{LR}[1].tokens=1600Ki"],
         f"{LR}: its segments go on to 1802240 tokens and the phase ends at 983040; the rate ends at 0.000632, not at"),
        ([f"{BATCH}[0].tokens=1920Ki"],
         f"{BATCH}[0].tokens=1966080: the phase is one step, as it has only 983040"),
        (["stage.phases[0].batch=[{at: 0, tokens: 8Ki}, {at: 10M, tokens: 16Ki}]"],
         f"{BATCH}[1].at=10000000: never reached"),
        (["stage.phases[0].batch=[{at: 0, tokens: 8Ki}, {at: 960Ki, tokens: 16Ki}]"],
         f"{BATCH}[1].at={Q_TOKENS}: never reached"),
        (["stage=long_ctx", "stage.phases[1].seq_len=64Ki"],
         "stage.phases[1].seq_len=65536: shorter than the 131072 tokens that stage.phases[0] is trained with"),
    ],
)  # fmt: skip
def test_faults_of_a_stage_are_told(overrides: list[str], expected: str) -> None:
    stage = [] if overrides[0].startswith("stage=") else [QUICK]
    assert any(line.startswith(expected) for line in warnings(*stage, *overrides)), warnings(*stage, *overrides)


def test_a_last_segment_that_is_cut_within_a_step_or_stays_the_same_is_no_fault() -> None:
    assert warnings(QUICK, f"{LR}[1].tokens=807Ki") == []
    assert warnings("stage=long_ctx", "stage.phases[0].lr[0].tokens=900B") == []


def test_lengths_below_the_checkpoint_s() -> None:
    assert warnings(QUICK, trained=512) == [] and warnings(QUICK, trained=None) == []
    (line,) = warnings(QUICK, trained=2048)
    assert line.startswith("stage.phases[0].seq_len=512: shorter than the 2048 tokens that the weights it starts from")


def test_rope_bases_below_the_checkpoint_s_and_the_phase_s_before() -> None:
    assert warnings("stage=long_ctx", base=1e4) == []
    (one,) = warnings("stage=long_ctx_128k", base=1e7)
    assert one.startswith("stage.phases[0].rope_base=5e+06: lower than the 1e+07 that the weights it starts from")
    (two,) = warnings("stage=long_ctx", "stage.phases.2.rope_base=6e6")
    assert two.startswith("stage.phases[2].rope_base=6e+06: lower than the 1e+07 that stage.phases[1] is trained with")


def test_the_length_that_a_checkpoint_was_trained_with() -> None:
    stage = {"step": 1, "config": asdict(config("stage=long_ctx", "stage.scale=1/1024"))}
    first = 300 * 10**9 // 1024
    assert trained_length({**stage, "tokens": 5}) == 128
    assert trained_length({**stage, "tokens": first + 10**6}) == 512
    assert trained_length({**stage, "tokens": 10**12}) == 1024
    assert trained_length({}) is None and trained_length({**stage, "tokens": 0}) is None


def test_a_scaled_stage_keeps_ten_steps_of_warm_up() -> None:
    given = ("stage.scale=1/16", "stage.batch_scale=1/128", "stage.token_scale=1/700000")
    phases = scaled_phases(config(*given).stage)
    plan = RunPlan(phases, dp_size=1, micro_batch_rows=1)
    steps, progress = [], Progress()
    while (step := plan.next(progress)) is not None:
        steps.append(step)
        progress = step.after(step.num_rows * phases[0].seq_len)
    rises = [step.lr / after.before.tokens for step, after in pairwise(steps[:11])]
    assert rises == pytest.approx([rises[0]] * 10) and steps[9].lr == 2e-4 == steps[10].lr
    assert steps[-1].lr == pytest.approx(3e-5)
    assert sum(segment.tokens for segment in phases[0].lr) == pytest.approx(phases[0].tokens, abs=4)
    assert warnings(*given[:2], "stage.token_scale=1/700000") == []


def test_a_warm_up_takes_a_third_of_a_phase_at_most_and_no_more_steps_than_it_had() -> None:
    (tiny,) = scaled_phases(config(QUICK, "stage.token_scale=1/24").stage)  # 5 steps
    assert tiny.lr[0].tokens == tiny.tokens // 3
    (short,) = scaled_phases(config(QUICK, "stage.token_scale=1/2", f"{LR}[0].tokens=32Ki").stage)  # 4 steps unscaled
    assert short.lr[0].tokens == 32 * 1024 and short.lr[1].tokens == 400 * 1024 - 16 * 1024
    (unscaled,) = scaled_phases(config(QUICK, f"{LR}[0].tokens=32Ki").stage)
    assert [segment.tokens for segment in unscaled.lr] == [32 * 1024, 800 * 1024]
