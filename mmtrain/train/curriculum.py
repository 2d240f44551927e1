"""A stage as pure functions of the position: which rows the next step reads, its learning rate, and what is left.

A position counts the tokens of text that were consumed, which padding makes fewer than the rows hold, and the rows of
the phase's stream. Nothing here depends on the number of processes except the check that a batch can be shared out, so
a run continues the same stream after a restart, on another number of processes or with another batch.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mmtrain.checkpoint.progress import Progress
from mmtrain.config import BatchStep, PhaseConfig, StageConfig
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.parallel.memory.predict import MemoryPrediction
from mmtrain.train.left_out import LeftOut, first_kept
from mmtrain.train.lr_schedule import lr_at
from mmtrain.train.phase_layouts import PhaseLayout, of_each_phase
from mmtrain.train.warmup_floor import keep_warmup


def scaled_phases(stage: StageConfig) -> list[PhaseConfig]:
    """Apply the stage's three scales to its phases.

    `scale` shrinks the sequence length, the limits of buckets, tokens, batches and schedule alike: the length is
    rounded to whole tokens and the ratio that this makes is applied to the rest, so that steps and rows a step stay
    exactly as they were.
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
        buckets=[
            replace(bucket, below=_scaled(bucket.below, ratio, f"{option}.buckets[{i}].below", "raise stage.scale"))
            if bucket.below is not None
            else bucket
            for i, bucket in enumerate(phase.buckets)
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


class PhasePlan:
    """The batches, length and learning rate of one phase, by the tokens consumed in it.

    A step takes the batch of the last ramp point that the tokens consumed before it have reached, and the phase ends
    with the first step that reaches its tokens. A batch is the nearest whole number of rows, at least one.

    Args:
        phase: a phase with its scales applied.
        dp_size: processes that share a batch.
        micro_batch_rows: rows that a process runs at once.
        option: name of the phase in messages.
        laid: the phase's layout, where the run has layouts.

    Attributes:
        rows: rows of a step's batch, for each ramp point.
        memory: predicted peak of a device's memory, once it is known.

    Raises:
        ConfigError: the rows of a batch are not a multiple of `dp_size` x `micro_batch_rows`.
    """

    def __init__(
        self,
        phase: PhaseConfig,
        dp_size: int,
        micro_batch_rows: int,
        option: str = "phase",
        laid: PhaseLayout | None = None,
    ) -> None:
        self.phase, self.laid = phase, laid
        self.memory: MemoryPrediction | None = None
        self.rows = [max(1, round(Fraction(point.tokens, phase.seq_len))) for point in phase.batch]
        for i, (point, rows) in enumerate(zip(phase.batch, self.rows, strict=True)):
            if rows in self.used_rows():
                _check_rows(f"{option}.batch[{i}]", point.tokens, phase.seq_len, rows, dp_size, micro_batch_rows)

    def used_rows(self) -> set[int]:
        """Return the batches, in rows, that steps of the phase may have."""
        pairs = zip(self.phase.batch, self.rows, strict=True)
        return {rows for point, rows in pairs if point.at < self.phase.tokens}

    def num_rows(self, tokens: int) -> int:
        """Return the rows of the step that begins after `tokens` tokens of the phase."""
        return self.rows[max(i for i, point in enumerate(self.phase.batch) if point.at <= tokens)]

    def lr(self, tokens: int) -> float:
        """Return the learning rate of that step: the schedule's where it ends, if its rows have no padding."""
        return lr_at(self.phase.lr, tokens + self.num_rows(tokens) * self.phase.seq_len)

    def left(self, tokens: int = 0, limit: int = sys.maxsize) -> tuple[int, int]:
        """Return the steps from `tokens` tokens to the phase's end, at most `limit`, and the tokens of their rows.

        The last step runs past the phase's tokens by up to one batch less one row. With padding there are more steps.
        """
        steps, at = 0, tokens
        ends = [*(point.at for point in self.phase.batch[1:]), self.phase.tokens]
        for end, rows in zip(ends, self.rows, strict=True):
            batch = rows * self.phase.seq_len
            count = min(limit - steps, max(0, _ceil_div(min(end, self.phase.tokens) - at, batch)))
            steps, at = steps + count, at + count * batch
        return steps, at - tokens


@dataclass(frozen=True)
class RunStep:
    """One optimizer step of a run.

    Attributes:
        before: position of the run before it.
        phase_index: the phase that it belongs to.
        first_row: first row of the phase's stream that it reads.
        num_rows: rows that it reads.
        lr: its learning rate.
    """

    before: Progress
    phase_index: int
    first_row: int
    num_rows: int
    lr: float

    @property
    def number(self) -> int:
        """Number of the step in the run, from 1, as metrics count."""
        return self.before.step + 1

    def after(self, tokens: int) -> Progress:
        """Return the position of the run once the step has consumed its rows, which held `tokens` tokens of text."""
        same_phase = self.before.phase == self.phase_index
        return Progress(
            step=self.before.step + 1,
            tokens=self.before.tokens + tokens,
            phase=self.phase_index,
            row=self.first_row + self.num_rows,
            phase_tokens=(self.before.phase_tokens if same_phase else 0) + tokens,
        )


class RunPlan:
    """The steps of all phases of a run, each from the position that the one before has left.

    Args:
        phases: phases with their scales applied (:func:`scaled_phases`).
        dp_size: processes that share a batch.
        micro_batch_rows: rows that a process runs at once.

    Attributes:
        phases: one plan a phase.
        left_out: rows that no step reads; the steps before and behind them follow each other.

    Raises:
        ConfigError: a batch cannot be shared out.
    """

    def __init__(self, phases: Sequence[PhaseConfig], dp_size: int, micro_batch_rows: int) -> None:
        self.left_out: tuple[LeftOut, ...] = ()
        self.phases = [
            PhasePlan(phase, dp_size, micro_batch_rows, f"stage.phases[{i}]") for i, phase in enumerate(phases)
        ]

    @classmethod
    def laid_out(cls, phases: Sequence[PhaseConfig], layouts: Sequence[PhaseLayout]) -> RunPlan:
        """Plan phases that have a layout each.

        Raises:
            ConfigError: a batch cannot be shared out: the first, and in its problem those of the other phases.
        """

        def planned(i: int, phase: PhaseConfig) -> PhasePlan:
            laid = layouts[i]
            return PhasePlan(phase, laid.layout.dp, laid.parallel.micro_batch_rows, f"stage.phases[{i}]", laid)

        plan = cls([], 1, 1)
        plan.phases = of_each_phase(phases, planned)
        return plan

    def next(self, progress: Progress) -> RunStep | None:
        """Return the step that follows a position; None at the end of the last phase."""
        index, row, tokens = progress.phase, progress.row, progress.phase_tokens
        while index < len(self.phases) and tokens >= self.phases[index].phase.tokens:
            index, row, tokens = index + 1, 0, 0
        if index >= len(self.phases):
            return None
        phase, row = self.phases[index], first_kept(row, index, self.left_out)
        return RunStep(progress, index, row, phase.num_rows(tokens), phase.lr(tokens))

    def left(self, progress: Progress | None = None, limit: int = sys.maxsize) -> tuple[int, int]:
        """Return the steps from a position (None: the beginning) to the end, at most `limit`, and their rows' tokens.

        Rows with padding hold fewer tokens of text, so that it takes more steps.
        """
        at = progress or Progress()
        steps = tokens = 0
        for i, phase in enumerate(self.phases[at.phase :]):
            more, length = phase.left(at.phase_tokens if i == 0 else 0, limit - steps)
            steps, tokens = steps + more, tokens + length
        return steps, tokens

    def left_in_phase(self, progress: Progress, max_steps: int | None = None) -> int:
        """Return the steps from a position to the end of its phase, or of `max_steps` in all: 0 exactly at the end."""
        steps, _ = self.phases[progress.phase].left(progress.phase_tokens)
        return steps if max_steps is None else min(steps, max(0, max_steps - progress.step))

    def position(self, step: int, tokens: int) -> Progress:
        """Return the position after so many steps and tokens of this very plan, whose rows have no padding.

        Checkpoints that were written before they recorded phase and row need it.
        """
        left = tokens
        for index, phase in enumerate(self.phases):
            _, length = phase.left()
            if left <= length or index == len(self.phases) - 1:
                break
            left -= length
        return Progress(step, tokens, index, left // phase.phase.seq_len, left)


def phase_seed(seed: int, phase_index: int) -> int:
    """Return the data seed of a phase, below 2^31: phases over one corpus must not see it in the same order."""
    digest = hashlib.sha256(f"{seed}/{phase_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def rank_rows(first_row: int, dp_rank: int, dp_size: int, micro_batch_rows: int) -> Iterator[list[int]]:
    """Yield, without end, the stream rows of the micro-batches that a rank runs from a row on, step after step.

    Micro-batch j of a step is its rows [j*m, (j+1)*m), whatever the number of ranks; rank r runs those with
    j % dp_size == r. Dealt in turn, the micro-batches that run at the same time are neighbours in the stream. Steps
    have a multiple of dp_size x m rows, so that the dealing goes on over their ends, whatever their sizes.

    Args:
        first_row: first row of a step.
        dp_rank: this process among those that share the batch.
        dp_size: how many they are.
        micro_batch_rows: rows m of a micro-batch.
    """
    for start in itertools.count(first_row + dp_rank * micro_batch_rows, dp_size * micro_batch_rows):
        yield list(range(start, start + micro_batch_rows))


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
