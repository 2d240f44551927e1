"""Stages as functions of the step: ramps against a naive loop, scales, phases and the rows of each rank."""

import random
from pathlib import Path

import pytest

from mmtrain.config import BatchStep, LrSegment, PhaseConfig, StageConfig
from mmtrain.config.cli import compose
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import PhasePlan, RunPlan, StepPlan, phase_seed, rank_batches, scaled_phases
from mmtrain.train.lr_schedule import lr_at

CONFIGS = Path(__file__).parents[2] / "configs"


def make_phase(tokens, ramp, seq_len=8, name="phase"):
    batch = [BatchStep(Count(at), Count(size)) for at, size in ramp]
    lr = [LrSegment("linear", Count(max(1, tokens // 4)), 1e-3), LrSegment("exponential", Count(tokens), 1e-4, 1e-3)]
    return PhaseConfig(name, Count(seq_len), 10_000.0, Count(tokens), batch, lr)


def naive_steps(phase):
    steps, tokens, row = [], 0, 0
    while tokens < phase.tokens:
        size = [step.tokens for step in phase.batch if step.at <= tokens][-1]
        rows = max(1, round(size / phase.seq_len))
        after = tokens + rows * phase.seq_len
        steps.append(StepPlan(len(steps), row, rows, tokens, after, lr_at(phase.lr, after)))
        tokens, row = after, row + rows
    return steps


@pytest.mark.parametrize("seed", range(40))
def test_ramp_equals_naive_loop(seed):
    draw = random.Random(seed)
    points = sorted(draw.sample(range(1, 3000), draw.randrange(5)))
    ramp = [(0, draw.randrange(8, 400))] + [(at, draw.randrange(8, 400)) for at in points]
    phase = make_phase(draw.randrange(1, 4000), ramp, seq_len=draw.choice([1, 7, 8, 64]))
    plan, expected = PhasePlan(phase, 1, 1), naive_steps(phase)
    assert [plan.step(i) for i in range(plan.num_steps)] == expected
    assert plan.tokens == expected[-1].tokens_after


def test_batch_changes_with_the_first_step_at_or_past_the_point():
    plan = PhasePlan(make_phase(96, [(0, 16), (32, 32)]), 1, 1)
    assert [plan.step(i).tokens_before for i in range(plan.num_steps)] == [0, 16, 32, 64]
    late = PhasePlan(make_phase(96, [(0, 16), (33, 32)]), 1, 1)
    assert [late.step(i).tokens_before for i in range(late.num_steps)] == [0, 16, 32, 48, 80]


def test_paper_stage_at_random_access():
    (phase,) = scaled_phases(compose(["stage=pretrain", "run.name=a", "data.path=b"], CONFIGS).stage)
    plan = PhasePlan(phase, dp_size=512, micro_batch_rows=1)
    assert 100_000 < plan.num_steps < 200_000
    assert plan.step(0) == StepPlan(0, 0, 2048, 0, 16 * 2**20, pytest.approx(2e-4 / 500))
    assert plan.step(499).lr == 2e-4
    last = plan.step(plan.num_steps - 1)
    assert last.num_rows == 16384 and last.tokens_before < 11_400_000_000_000 <= last.tokens_after
    assert last.lr == 3e-5
    for at, before, after in ((69e9, 2048, 4096), (790e9, 4096, 8192), (4.7e12, 8192, 16384)):
        first = next(ramp.first_step for ramp in plan.ramps if ramp.num_rows == after)
        assert plan.step(first - 1).num_rows == before
        assert plan.step(first - 1).tokens_before < at <= plan.step(first).tokens_before


def test_steps_outside_a_plan_are_refused():
    plan = PhasePlan(make_phase(64, [(0, 16)]), 1, 1)
    for step in (-1, plan.num_steps):
        with pytest.raises(IndexError):
            plan.step(step)


@pytest.mark.parametrize("scale", [1 / 256, 0.01, 0.3, 1.0])
def test_scale_keeps_steps_and_rows(scale):
    stage = compose(["stage=long_ctx", "run.name=a", "data.path=b"], CONFIGS).stage
    full = RunPlan(scaled_phases(stage), 1, 1)
    stage.scale = scale
    small = RunPlan(scaled_phases(stage), 1, 1)
    assert small.num_steps == full.num_steps
    assert small.first_steps == full.first_steps
    for step in (0, full.first_steps[1], full.num_steps - 1):
        assert small.step(step).plan.num_rows == full.step(step).plan.num_rows
        assert small.step(step).plan.lr == full.step(step).plan.lr
    assert [p.phase.seq_len for p in small.phases] == [round(p.phase.seq_len * scale) for p in full.phases]


def test_token_scale_shortens_and_batch_scale_thins():
    phase = make_phase(6400, [(0, 64), (3200, 128)])
    (shorter,) = scaled_phases(StageConfig("s", [phase], token_scale=0.5))
    assert (shorter.seq_len, shorter.tokens, shorter.batch[1].at, shorter.batch[1].tokens) == (8, 3200, 1600, 128)
    assert [segment.tokens for segment in shorter.lr] == [800, 3200]
    (thinner,) = scaled_phases(StageConfig("s", [phase], batch_scale=0.5))
    assert (thinner.tokens, thinner.batch[1].at, thinner.batch[1].tokens) == (6400, 3200, 64)
    assert thinner.lr == phase.lr


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("scale", 0.01, "seq_len"), ("token_scale", 1e-5, "tokens"), ("batch_scale", 1e-3, "batch")],
)
def test_scaling_to_nothing_is_refused(option, value, named):
    with pytest.raises(ConfigError, match="below 1") as caught:
        scaled_phases(StageConfig("s", [make_phase(6400, [(0, 64)])], **{option: value}))
    assert named in caught.value.option and "stage." in caught.value.fix


def test_rows_that_do_not_divide_are_refused_with_the_arithmetic():
    with pytest.raises(ConfigError) as caught:
        PhasePlan(make_phase(6400, [(0, 128)]), dp_size=3, micro_batch_rows=2)
    message = str(caught.value)
    for part in ("16 rows of 8 tokens", "multiple of 6", "12 rows (96 tokens)", "18 rows (144 tokens)"):
        assert part in message
    with pytest.raises(ConfigError) as caught:
        PhasePlan(make_phase(6400, [(0, 8)]), dp_size=4, micro_batch_rows=1)
    assert "take 4 rows (32 tokens)" in str(caught.value)


def test_run_plan_joins_phases():
    first, second = make_phase(100, [(0, 24)], name="a"), make_phase(40, [(0, 16)], seq_len=16, name="b")
    run = RunPlan([first, second], 1, 1)
    assert (run.num_steps, run.first_steps, run.first_tokens) == (5 + 3, [0, 5], [0, 120])
    assert run.tokens == 120 + 48
    steps = [run.step(i) for i in range(run.num_steps)]
    assert [step.phase_index for step in steps] == [0] * 5 + [1] * 3
    assert steps[5].plan == run.phases[1].step(0)
    assert [step.tokens_after for step in steps] == [24, 48, 72, 96, 120, 136, 152, 168]
    with pytest.raises(IndexError):
        run.step(8)


@pytest.mark.parametrize("micro_batch_rows", [1, 2])
def test_micro_batches_do_not_depend_on_the_number_of_ranks(micro_batch_rows):
    plan = StepPlan(0, 40, 24, 0, 0, 0.0)
    alone = rank_batches(plan, 0, 1, micro_batch_rows)
    assert [row for rows in alone for row in rows] == list(range(40, 64))
    for dp_size in (2, 3, 4, 12):
        shares = [rank_batches(plan, rank, dp_size, micro_batch_rows) for rank in range(dp_size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(rows for share in shares for rows in share) == alone


def test_phase_seeds_differ_and_stay_what_they_were():
    seeds = {phase_seed(seed, phase) for seed in range(20) for phase in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**31 for seed in seeds)
    assert phase_seed(1234, 0) == 1265307806, "changing this changes the data of every run"
