"""A stage as pure functions of the step number: which rows a step reads, its tokens and its learning rate.

Nothing here depends on the number of processes except the check that a batch can be shared out, so a run continues the
same stream after a restart or on another number of processes.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mmtrain.config import BatchStep, PhaseConfig, StageConfig
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.train.lr_schedule import lr_at
from mmtrain.train.warmup_floor import keep_warmup


def scaled_phases(stage: StageConfig) -> list[PhaseConfig]:
    """Apply the stage's three scales to its phases.

    `scale` shrinks the sequence length, tokens, batches and schedule alike: the length is rounded to whole tokens and
    the ratio that this makes is applied to the rest, so that steps and rows a step stay exactly as they were.
    `token_scale` multiplies tokens, ramp points and schedule lengths again, `batch_scale` batches. A warm-up keeps some
    steps (:func:`~mmtrain.train.warmup_floor.keep_warmup`).

    Raises:
        ConfigError: a length or count falls below 1, or two ramp points fall together.
    """
    return [_scaled_phase(stage, phase, f"stage.phases[{i}]") for i, phase in enumerate(stage.phases)]


def _scaled_phase(stage: StageConfig, phase: PhaseConfig, option: str) -> PhaseConfig:
    seq_len = _scaled(phase.seq_len, Fraction(stage.scale), f"{option}.seq_len", "raise stage.scale")
    ratio = Fraction(seq_len, phase.seq_len)
    length, batch = ratio * Fraction(stage.token_scale), ratio * Fraction(stage.batch_scale)
    fix = "raise stage.scale or stage.token_scale"
    made = replace(
        phase,
        seq_len=seq_len,
        tokens=_scaled(phase.tokens, length, f"{option}.tokens", fix),
        batch=[
            BatchStep(
                _scaled(step.at, length, f"{option}.batch[{i}].at", fix),
                _scaled(step.tokens, batch, f"{option}.batch[{i}].tokens", "raise stage.scale or stage.batch_scale"),
            )
            for i, step in enumerate(phase.batch)
        ],
        lr=[
            replace(segment, tokens=_scaled(segment.tokens, length, f"{option}.lr[{i}].tokens", fix))
            for i, segment in enumerate(phase.lr)
        ],
    )
    made.validate(option)
    return keep_warmup(phase, made)


def _scaled(count: int, ratio: Fraction, option: str, fix: str) -> Count:
    """Scale a count to the nearest whole number; zero stays zero, anything else must not become it."""
    scaled = round(count * ratio)
    if count and scaled < 1:
        raise ConfigError(option, count, f"scaled by {float(ratio):.3g} it falls below 1", fix)
    return Count(scaled)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of a phase.

    Attributes:
        step: number of the step in its phase, from 0.
        first_row: first row of the phase's sample stream that the step reads.
        num_rows: rows that it reads.
        tokens_before: tokens of the phase consumed before it.
        tokens_after: and after it.
        lr: its learning rate.
    """

    step: int
    first_row: int
    num_rows: int
    tokens_before: int
    tokens_after: int
    lr: float


@dataclass(frozen=True)
class _Ramp:
    """Steps of one batch size: where they start (step, row of the stream) and how many rows each reads."""

    first_step: int
    first_row: int
    num_rows: int


class PhasePlan:
    """The steps of one phase, at random access.

    A step takes the batch of the last ramp point that the tokens consumed before it have reached, and the phase ends
    with the first step that reaches its tokens. A batch is the nearest whole number of rows, at least one.

    Args:
        phase: a phase with its scales applied.
        dp_size: processes that share a batch.
        micro_batch_rows: rows that a process runs at once.
        option: name of the phase in messages.

    Attributes:
        num_steps: steps of the phase.
        tokens: tokens that they consume, the phase's tokens or up to one batch more.

    Raises:
        ConfigError: the rows of a batch are not a multiple of `dp_size` x `micro_batch_rows`.
    """

    def __init__(self, phase: PhaseConfig, dp_size: int, micro_batch_rows: int, option: str = "phase") -> None:
        self.phase, self.ramps = phase, []
        step = row = 0
        for i, point in enumerate(phase.batch):
            end = min([phase.tokens, *[later.at for later in phase.batch[i + 1 : i + 2]]])
            num_rows = max(1, round(Fraction(point.tokens, phase.seq_len)))
            steps = _ceil_div(end - row * phase.seq_len, num_rows * phase.seq_len)
            if steps <= 0:  # the step before has run past this stretch
                continue
            _check_rows(f"{option}.batch[{i}]", point.tokens, phase.seq_len, num_rows, dp_size, micro_batch_rows)
            self.ramps.append(_Ramp(step, row, num_rows))
            step, row = step + steps, row + steps * num_rows
        self.num_steps, self.tokens = step, row * phase.seq_len

    def step(self, step: int) -> StepPlan:
        """Return the plan of a step.

        Raises:
            IndexError: the phase has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a phase of {self.num_steps} steps")
        ramp = self.ramps[bisect.bisect_right(self.ramps, step, key=lambda ramp: ramp.first_step) - 1]
        first_row = ramp.first_row + (step - ramp.first_step) * ramp.num_rows
        before = first_row * self.phase.seq_len
        after = before + ramp.num_rows * self.phase.seq_len
        return StepPlan(step, first_row, ramp.num_rows, before, after, lr_at(self.phase.lr, after))


@dataclass(frozen=True)
class RunStep:
    """One optimizer step of a run.

    Attributes:
        step: number of the step in the run, from 0.
        phase_index: the phase that it belongs to.
        plan: the step within that phase.
        tokens_before_phase: tokens that all earlier phases consumed.
    """

    step: int
    phase_index: int
    plan: StepPlan
    tokens_before_phase: int

    @property
    def tokens_after(self) -> int:
        """Tokens that the run has consumed after this step."""
        return self.tokens_before_phase + self.plan.tokens_after


class RunPlan:
    """The steps of all phases of a run, at random access.

    Args:
        phases: phases with their scales applied (:func:`scaled_phases`).
        dp_size: processes that share a batch.
        micro_batch_rows: rows that a process runs at once.

    Attributes:
        phases: one plan a phase.
        first_steps: number of each phase's first step in the run.
        first_tokens: tokens consumed before each phase.
        num_steps: steps of the run.
        tokens: tokens that they consume.

    Raises:
        ConfigError: a batch cannot be shared out.
    """

    def __init__(self, phases: Sequence[PhaseConfig], dp_size: int, micro_batch_rows: int) -> None:
        self.phases = [
            PhasePlan(phase, dp_size, micro_batch_rows, f"stage.phases[{i}]") for i, phase in enumerate(phases)
        ]
        self.first_steps, self.first_tokens = [], []
        self.num_steps = self.tokens = 0
        for plan in self.phases:
            self.first_steps.append(self.num_steps)
            self.first_tokens.append(self.tokens)
            self.num_steps += plan.num_steps
            self.tokens += plan.tokens

    def step(self, step: int) -> RunStep:
        """Return the plan of a step of the run.

        Raises:
            IndexError: the run has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a run of {self.num_steps} steps")
        index = bisect.bisect_right(self.first_steps, step) - 1
        plan = self.phases[index].step(step - self.first_steps[index])
        return RunStep(step, index, plan, self.first_tokens[index])


def phase_seed(seed: int, phase_index: int) -> int:
    """Return the data seed of a phase, below 2^31: phases over one corpus must not see it in the same order."""
    digest = hashlib.sha256(f"{seed}/{phase_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def rank_batches(plan: StepPlan, dp_rank: int, dp_size: int, micro_batch_rows: int) -> list[list[int]]:
    """Return the stream rows of each micro-batch that a rank runs in a step.

    Micro-batch j of a step is its rows [j*m, (j+1)*m), whatever the number of ranks; rank r runs those with
    j % dp_size == r. Dealt in turn, the micro-batches that run at the same time are neighbours in the stream.

    Args:
        plan: the step.
        dp_rank: this process among those that share the batch.
        dp_size: how many they are.
        micro_batch_rows: rows m of a micro-batch.
    """
    starts = range(plan.first_row, plan.first_row + plan.num_rows, micro_batch_rows)
    return [list(range(start, start + micro_batch_rows)) for start in starts[dp_rank::dp_size]]


def _check_rows(option: str, tokens: int, seq_len: int, num_rows: int, dp_size: int, micro_batch_rows: int) -> None:
    """Refuse a batch that does not split into whole micro-batches for every process."""
    unit = dp_size * micro_batch_rows
    if num_rows % unit == 0:
        return
    lower, upper = num_rows // unit * unit, _ceil_div(num_rows, unit) * unit
    working = " or ".join(f"{rows} rows ({rows * seq_len} tokens)" for rows in (lower, upper) if rows)
    raise ConfigError(
        f"{option}.tokens",
        tokens,
        f"{num_rows} rows of {seq_len} tokens are not a multiple of {unit} "
        f"({dp_size} data-parallel processes x parallel.micro_batch_rows={micro_batch_rows})",
        f"take {working}, or change stage.batch_scale or parallel.micro_batch_rows",
    )


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
