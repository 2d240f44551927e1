"""Options of a stage: its phases, their schedules and mixtures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mmtrain.config.checks import choose, require
from mmtrain.config.option_marks import FREE_ON_RESUME
from mmtrain.config.schema import Count

LR_KINDS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, fraction: start + (end - start) * fraction,
    "constant": lambda start, end, fraction: end,
    "exponential": lambda start, end, fraction: start * (end / start) ** fraction,
}
"""Kinds of learning-rate segment, each a function (start, end, fraction of its length in (0, 1)) -> rate."""


@dataclass
class LrSegment:
    """A stretch of the learning-rate schedule, `tokens` long.

    Attributes:
        kind: a name of LR_KINDS: ``linear`` or ``exponential`` from `start` to `end`, or ``constant`` at `end`.
    """

    kind: str
    tokens: Count
    end: float
    start: float = 0.0

    def validate(self, option: str) -> None:
        """Refuse shapes of schedule that are not defined."""
        choose(f"{option}.kind", self.kind, tuple(LR_KINDS))
        require(min(self.start, self.end) >= 0, f"{option}.end", self.end, "must not be negative", "for example 2e-4")
        require(self.kind != "exponential" or (self.start > 0 and self.end > 0), f"{option}.start", self.start,
                 "exponential decay needs start and end above 0", "give both")  # fmt: skip


@dataclass
class BatchStep:
    """The global batch, in tokens, from `at` consumed tokens of the phase on."""

    at: Count
    tokens: Count


@dataclass
class SourceConfig:
    """One prepared corpus of a mixture.

    Attributes:
        path: where it lies. A run may be resumed with the corpus moved: its fingerprint is compared, not its path.
        weight: its share of the rows, beside the weights of the other sources.
    """

    path: str = field(metadata=FREE_ON_RESUME)
    weight: float = 1.0


@dataclass
class PhaseConfig:
    """A stretch of training with one sequence length and one RoPE base (MiniMax-01 Table 6).

    Attributes:
        tokens: length of the phase.
        batch: batch-size ramp by tokens consumed in the phase; the first entry starts at 0.
        lr: learning-rate segments by tokens consumed in the phase; the last one's end value holds on.
        sources: mixture for this phase; null takes `data.sources`.
    """

    name: str
    seq_len: Count
    rope_base: float
    tokens: Count
    batch: list[BatchStep]
    lr: list[LrSegment]
    sources: list[SourceConfig] | None = None

    def validate(self, option: str) -> None:
        """Refuse phases that cannot run."""
        require(self.seq_len >= 1, f"{option}.seq_len", self.seq_len, "must be at least 1", "raise it or stage.scale")
        require(self.tokens >= 1, f"{option}.tokens", self.tokens, "must be at least 1", "raise it or the scales")
        require(bool(self.batch) and self.batch[0].at == 0, f"{option}.batch", [b.at for b in self.batch],
                 "the ramp must start at 0 tokens", "add {at: 0, tokens: ...}")  # fmt: skip
        ats = [step.at for step in self.batch]
        require(ats == sorted(set(ats)), f"{option}.batch", ats, "ramp points must increase", "sort them")
        for i, step in enumerate(self.batch):
            require(step.tokens >= 1, f"{option}.batch[{i}].tokens", step.tokens, "must be at least 1", "give tokens")
        for i, source in enumerate(self.sources or []):
            require(source.weight > 0, f"{option}.sources[{i}].weight", source.weight, "must be above 0", "drop it")
        require(bool(self.lr), f"{option}.lr", self.lr, "needs at least one segment", "add {kind: constant, ...}")
        for i, segment in enumerate(self.lr):
            segment.validate(f"{option}.lr[{i}]")


@dataclass
class StageConfig:
    """A run's phases, in order.

    Attributes:
        scale: multiplies sequence lengths, tokens, batches and schedule lengths alike, so that the number of steps and
            of rows in a batch stay as they are.
        token_scale: multiplies tokens and schedule lengths again, for fewer steps.
        batch_scale: multiplies batches again, for fewer rows.
    """

    name: str
    phases: list[PhaseConfig]
    scale: float = 1.0
    token_scale: float = 1.0
    batch_scale: float = 1.0

    def validate(self) -> None:
        """Refuse empty stages and senseless scales."""
        require(bool(self.phases), "stage.phases", [], "needs at least one phase", "choose +stage=pretrain")
        for name in ("scale", "token_scale", "batch_scale"):
            require(getattr(self, name) > 0, f"stage.{name}", getattr(self, name), "must be above 0", "1 is unscaled")
        for i, phase in enumerate(self.phases):
            phase.validate(f"stage.phases[{i}]")
