"""Options of a stage: its phases, their schedules and mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from mmtrain.config.allowed import above, at_least, check_allowed, key_of
from mmtrain.config.checks import require
from mmtrain.config.option_marks import FREE_ON_RESUME
from mmtrain.config.parallel import PhaseParallelConfig
from mmtrain.config.schema import Count

LR_KINDS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, fraction: start + (end - start) * fraction,
    "constant": lambda start, end, fraction: end,
    "cosine": lambda start, end, fraction: end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2,
    "exponential": lambda start, end, fraction: start * (end / start) ** fraction,
}
"""Kinds of learning-rate segment, each a function (start, end, fraction of its length in (0, 1)) -> rate."""


@dataclass
class LrSegment:
    """A stretch of the learning-rate schedule, `tokens` long.

    Attributes:
        kind: ``linear``, ``cosine`` (half a wave) or ``exponential`` from `start` to `end`, or ``constant`` at `end`.
        tokens: length of the stretch.
        end: learning rate at its end.
        start: learning rate at its start; ``constant`` has none.
    """

    kind: str = field(metadata=key_of(LR_KINDS))
    tokens: Count = field(metadata=at_least(0))
    end: float = field(metadata=at_least(0, fix="for example 2e-4"))
    start: float = field(default=0.0, metadata=at_least(0, fix="for example 0"))

    def validate(self, option: str) -> None:
        """Refuse shapes of schedule that are not defined."""
        check_allowed(self, option)
        require(self.kind != "exponential" or (self.start > 0 and self.end > 0), f"{option}.start", self.start,
                 "exponential decay needs start and end above 0", "give both")  # fmt: skip


@dataclass
class BatchStep:
    """The global batch from a point of the phase on.

    Attributes:
        at: tokens of the phase consumed when it begins; 0 for the first.
        tokens: size of the batch in tokens, over all processes and micro-batches.
    """

    at: Count = field(metadata=at_least(0))
    tokens: Count = field(metadata=at_least(1))


@dataclass
class SourceConfig:
    """One prepared corpus of a mixture.

    Attributes:
        path: its folder, or the prefix of Megatron's .bin and .idx files. A run may be resumed with the corpus moved:
            its fingerprint is compared, not its path.
        weight: its share of the rows, beside the weights of the other sources.
    """

    path: str = field(metadata=FREE_ON_RESUME)
    weight: float = field(default=1.0, metadata=above(0, fix="leave the corpus out"))


@dataclass
class PhaseConfig:
    """A stretch of training with one sequence length and one RoPE base (MiniMax-01 Table 6).

    Attributes:
        name: of the phase, for records.
        seq_len: tokens of a row.
        rope_base: RoPE base of the softmax layers.
        tokens: length of the phase.
        batch: batch-size ramp by tokens consumed in the phase; the first entry starts at 0.
        lr: learning-rate segments by tokens consumed in the phase; the last one's end value holds on.
        sources: mixture for this phase; null takes `data.sources`.
        parallel: options of the group `parallel` that this phase has of its own, as {cp: 4}; others are the run's.
    """

    name: str
    seq_len: Count = field(metadata=at_least(1))
    rope_base: float = field(metadata=above(1))
    tokens: Count = field(metadata=at_least(1))
    batch: list[BatchStep]
    lr: list[LrSegment]
    sources: list[SourceConfig] | None = None
    parallel: PhaseParallelConfig | None = None

    def validate(self, option: str) -> None:
        """Refuse phases that cannot run."""
        check_allowed(self, option)
        require(bool(self.batch) and self.batch[0].at == 0, f"{option}.batch", [b.at for b in self.batch],
                 "the ramp must start at 0 tokens", "add {at: 0, tokens: ...}")  # fmt: skip
        ats = [step.at for step in self.batch]
        require(ats == sorted(set(ats)), f"{option}.batch", ats, "ramp points must increase", "sort them")
        require(bool(self.lr), f"{option}.lr", self.lr, "needs at least one segment", "add {kind: constant, ...}")
        for i, segment in enumerate(self.lr):
            segment.validate(f"{option}.lr[{i}]")


@dataclass
class StageConfig:
    """A run's phases, in order.

    Attributes:
        name: of the stage, for records.
        phases: stretches of training, one after another.
        scale: multiplies sequence lengths, tokens, batches and schedule lengths alike, so that the number of steps and
            of rows in a batch stay as they are.
        token_scale: multiplies tokens and schedule lengths again, for fewer steps.
        batch_scale: multiplies batches again, for fewer rows.
    """

    name: str
    phases: list[PhaseConfig]
    scale: float = field(default=1.0, metadata=above(0, fix="1 is unscaled"))
    token_scale: float = field(default=1.0, metadata=above(0, fix="1 is unscaled"))
    batch_scale: float = field(default=1.0, metadata=above(0, fix="1 is unscaled"))

    def validate(self) -> None:
        """Refuse empty stages and senseless scales."""
        require(bool(self.phases), "stage.phases", [], "needs at least one phase", "choose +stage=pretrain")
        check_allowed(self, "stage")
        for i, phase in enumerate(self.phases):
            phase.validate(f"stage.phases[{i}]")
