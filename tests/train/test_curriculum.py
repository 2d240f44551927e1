"""Stages as functions of the step: ramps against a naive loop, scales, phases and the rows of each rank."""

import random
from itertools import islice
from pathlib import Path

import pytest

from mmtrain.checkpoint.progress import Progress
from mmtrain.config import BatchStep, LrSegment, PhaseConfig, StageConfig
from mmtrain.config.cli import compose
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import PhasePlan, RunPlan, phase_seed, rank_rows, scaled_phases
from mmtrain.train.lr_schedule import lr_at

CONFIGS = Path(__file__).parents[2] / "configs"


def make_phase(tokens, ramp, seq_len=8, name="phase"):
    batch = [BatchStep(Count(at), Count(size)) for at, size in ramp]
    lr = [LrSegment("linear", Count(max(1, tokens // 4)), 1e-3), LrSegment("exponential", Count(tokens), 1e-4, 1e-3)]
    return PhaseConfig(name, Count(seq_len), 10_000.0, Count(tokens), batch, lr)


def walk(plan, pads=lambda step: 0):
    """The steps of a plan, in order, where some of a step's tokens may be padding."""
    steps, progress = [], Progress()
    while (step := plan.next(progress)) is not None:
        steps.append(step)
        size = step.num_rows * plan.phases[step.phase_index].phase.seq_len
        progress = step.after(size - pads(step))
    return steps, progress


def naive_steps(phase, pads=lambda i: 0):
    steps, tokens, row = [], 0, 0
    while tokens < phase.tokens:
        size = [step.tokens for step in phase.batch if step.at <= tokens][-1]
        rows = max(1, round(size / phase.seq_len))
        steps.append((tokens, row, rows, lr_at(phase.lr, tokens + rows * phase.seq_len)))
        tokens, row = tokens + rows * phase.seq_len - pads(len(steps)), row + rows
    return steps, tokens


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("padded", [False, True])
def test_ramp_equals_naive_loop(seed, padded):
    draw = random.Random(seed)
    points = sorted(draw.sample(range(1, 3000), draw.randrange(5)))
    ramp = [(0, draw.randrange(8, 400))] + [(at, draw.randrange(8, 400)) for at in points]
    phase = make_phase(draw.randrange(1, 4000), ramp, seq_len=draw.choice([2, 7, 8, 64]))
    pads = (lambda i: i % 2) if padded else (lambda i: 0)
    plan = RunPlan([phase], 1, 1)
    steps, end = walk(plan, lambda step: pads(step.number))
    expected, tokens = naive_steps(phase, pads)
    assert [(step.before.tokens, step.first_row, step.num_rows, step.lr) for step in steps] == expected
    assert (end.tokens, end.phase_tokens, end.step) == (tokens, tokens, len(expected))
    if not padded:
        assert plan.left() == (len(steps), tokens)
        for step in steps:
            at = step.before
            assert plan.left(at) == (len(steps) - at.step, tokens - at.tokens)
            assert plan.position(at.step, at.tokens) == at
        assert plan.left(None, 2)[0] == min(2, len(steps))


def test_batch_changes_with_the_first_step_at_or_past_the_point():
    def starts(ramp):
        return [step.before.tokens for step in walk(RunPlan([make_phase(96, ramp)], 1, 1))[0]]

    assert starts([(0, 16), (32, 32)]) == [0, 16, 32, 64]
    assert starts([(0, 16), (33, 32)]) == [0, 16, 32, 48, 80]


def test_paper_stage():
    (phase,) = scaled_phases(compose(["stage=pretrain", "run.name=a", "data.path=b"], CONFIGS).stage)
    plan = RunPlan([phase], dp_size=512, micro_batch_rows=1)
    steps, tokens = plan.left()
    assert 100_000 < steps < 200_000 and 0 <= tokens - 11_400_000_000_000 < 128 * 2**20
    first = plan.next(Progress())
    assert (first.num_rows, first.first_row, first.lr) == (2048, 0, pytest.approx(2e-4 / 500))
    at = Progress(499, 499 * 16 * 2**20, 0, 499 * 2048, 499 * 16 * 2**20)
    assert plan.next(at).lr == 2e-4
    last = plan.next(Progress(tokens=tokens - 1, phase_tokens=11_399_999_999_999))
    assert last.num_rows == 16384 and last.lr == 3e-5
    assert plan.next(Progress(phase_tokens=11_400_000_000_000)) is None
    for at, before, after in ((69e9, 2048, 4096), (790e9, 4096, 8192), (4.7e12, 8192, 16384)):
        assert plan.phases[0].num_rows(int(at) - 1) == before and plan.phases[0].num_rows(int(at)) == after


@pytest.mark.parametrize("scale", [1 / 256, 0.01, 0.3, 1.0])
def test_scale_keeps_steps_and_rows(scale):
    stage = compose(["stage=long_ctx", "run.name=a", "data.path=b"], CONFIGS).stage
    full = RunPlan(scaled_phases(stage), 1, 1)
    stage.scale = scale
    small = RunPlan(scaled_phases(stage), 1, 1)
    assert small.left()[0] == full.left()[0]
    for mine, theirs in zip(small.phases, full.phases, strict=True):
        assert mine.rows == theirs.rows and mine.lr(0) == theirs.lr(0)
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


def test_a_batch_that_no_step_reaches_need_not_divide():
    assert PhasePlan(make_phase(96, [(0, 16), (96, 24)]), dp_size=2, micro_batch_rows=1).used_rows() == {2}
    with pytest.raises(ConfigError, match="3 rows of 8 tokens"):
        PhasePlan(make_phase(97, [(0, 16), (96, 24)]), dp_size=2, micro_batch_rows=1)


def test_run_plan_joins_phases():
    first, second = make_phase(100, [(0, 24)], name="a"), make_phase(40, [(0, 16)], seq_len=16, name="b")
    run = RunPlan([first, second], 1, 1)
    assert run.left() == (5 + 3, 120 + 48)
    steps, end = walk(run)
    assert [step.phase_index for step in steps] == [0] * 5 + [1] * 3
    assert [step.first_row for step in steps] == [0, 3, 6, 9, 12, 0, 1, 2]
    assert [step.before.tokens for step in steps] == [0, 24, 48, 72, 96, 120, 136, 152]
    assert [step.lr for step in steps[5:]] == [lr_at(second.lr, tokens) for tokens in (16, 32, 48)]
    assert end == Progress(8, 168, 1, 3, 48)
    assert run.next(end) is None and run.left(end) == (0, 0)
    assert run.position(5, 120) == steps[5].before and run.position(8, 168) == end


def test_a_position_goes_on_under_another_batch():
    """Halving the batch from a checkpoint on reads the next rows and keeps the schedule's place in tokens."""
    at = Progress(4, 400, 0, 50, 400)
    plan = RunPlan([make_phase(800, [(0, 40)])], 1, 1)
    step = plan.next(at)
    assert (step.number, step.first_row, step.num_rows) == (5, 50, 5)
    assert step.lr == lr_at(plan.phases[0].phase.lr, 440)
    assert plan.left(at) == (10, 400)


@pytest.mark.parametrize("micro_batch_rows", [1, 2])
def test_micro_batches_do_not_depend_on_the_number_of_ranks(micro_batch_rows):
    def rows(rank, dp_size, count):
        return list(islice(rank_rows(40, rank, dp_size, micro_batch_rows), count // (dp_size * micro_batch_rows)))

    alone = rows(0, 1, 24)
    assert [row for batch in alone for row in batch] == list(range(40, 64))
    for dp_size in (2, 3, 4, 12):
        shares = [rows(rank, dp_size, 24) for rank in range(dp_size)]
        assert sorted(batch for share in shares for batch in share) == alone
        assert [share[0] for share in shares] == alone[:dp_size]


def test_phase_seeds_differ_and_stay_what_they_were():
    seeds = {phase_seed(seed, phase) for seed in range(20) for phase in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**31 for seed in seeds)
    assert phase_seed(1234, 0) == 1265307806, "changing this changes the data of every run"
