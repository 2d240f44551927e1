"""Options of a stage: its phases, their schedules and mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from mmtrain.config.allowed import above, at_least, check_allowed, key_of, share
from mmtrain.config.checks import choose, require
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
        weight: its share of the tokens, beside the weights of the other sources; in a phase with buckets, of the tokens
            of each bucket that it supplies.
        buckets: names of the phase's buckets that it supplies, which must hold documents of it; null: all of which it
            has documents. A phase without buckets takes all its documents.
        max_epochs: how often a run may read it, any bucket of it included; null takes `data.max_epochs`. (MiniMax-01:
            good text bears 4 epochs, poor text degrades the model after 2.)
    """

    path: str = field(metadata=FREE_ON_RESUME)
    weight: float = field(default=1.0, metadata=above(0, fix="leave the corpus out"))
    buckets: list[str] | None = None
    max_epochs: float | None = field(
        default=None, metadata={**FREE_ON_RESUME, **above(0, fix="null takes data.max_epochs")}
    )


@dataclass
class BucketConfig:
    """Documents of a range of lengths, and their share of a phase (MiniMax-01 Table 6).

    Attributes:
        name: of the bucket, for records and for the `buckets` of sources.
        share: of the phase's tokens, beside the shares of the other buckets; 0 leaves its documents out.
        below: its documents have fewer tokens, and as many as the bucket before it stops at, or more; null, in the last
            bucket: any number. `stage.scale` shrinks it.
    """

    name: str
    share: float = field(metadata=at_least(0, fix="0 leaves the documents out"))
    below: Count | None = field(default=None, metadata=at_least(1, fix="null is any number"))


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
            Where neither gives a `cp`, the phase gets the least that fits the processes and the device's memory.
        buckets: shares of the phase's tokens by length of document, from the shortest on; empty takes documents as they
            come.
        transition: share of the phase's tokens, from its start, over which the weights of sources and buckets go
            linearly from those of the phase before, at its end, to its own; the first phase's go from `data.sources`
            as they are without buckets. 0 changes them at once.
        long_share: share of `data.long_sources` among the tokens of the phase's last part; the rest keep their ratio.
        long_last: share of the phase's tokens that this last part is.
        frozen: parts of the model that the phase leaves as they are; null takes `optim.frozen`, which says how they are
            named, and [] trains all.
    """

    name: str
    seq_len: Count = field(metadata=at_least(1))
    rope_base: float = field(metadata=above(1))
    tokens: Count = field(metadata=at_least(1))
    batch: list[BatchStep]
    lr: list[LrSegment]
    sources: list[SourceConfig] | None = None
    parallel: PhaseParallelConfig | None = None
    buckets: list[BucketConfig] = field(default_factory=list)
    transition: float = field(default=0.0, metadata=share())
    long_share: float = field(default=0.0, metadata=share())
    long_last: float = field(default=0.2, metadata=share())
    frozen: list[str] | None = None

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
        self._validate_mixture(option)

    def _validate_mixture(self, option: str) -> None:
        limits = [bucket.below for bucket in self.buckets]
        known = [limit for limit in limits[:-1] if limit is not None]
        ordered = len(known) == len(limits[:-1]) and known == sorted(set(known)) and limits[-1:] in ([], [None])
        require(ordered, f"{option}.buckets", limits, "`below` must increase from bucket to bucket and be null in the "
                "last", "for example [32Ki, 128Ki, null]")  # fmt: skip
        names = [bucket.name for bucket in self.buckets]
        require(len(set(names)) == len(names), f"{option}.buckets", names, "names must differ", "rename one")
        shares = [bucket.share for bucket in self.buckets]
        require(not names or any(shares), f"{option}.buckets", shares, "no bucket has a share", "give one above 0")
        for j, source in enumerate(self.sources or []):
            for name in source.buckets or []:
                choose(f"{option}.sources[{j}].buckets", name, names)
        require(not self.long_share or self.transition + self.long_last <= 1, f"{option}.transition", self.transition,
                f"the transition must end before the last part begins, of long_last={self.long_last:g}",
                "lower one of both")  # fmt: skip


@dataclass
class PreferenceConfig:
    """Training on preference pairs by DPO (Rafailov et al. 2023), in place of next tokens.

    The reference is the model that the run starts from (`run.init_from`). MiniMax-01 states neither number.

    Attributes:
        beta: how far the model may go from the reference: the implicit reward of an answer is beta times what its
            log-probability gained.
        patience: validations in a row without a lower held-out loss after which the run ends; null trains to the end of
            the stage.
    """

    beta: float = field(default=0.1, metadata=above(0, fix="the paper of DPO has 0.1"))
    patience: int | None = field(
        default=None, metadata={**FREE_ON_RESUME, **at_least(1, fix="null trains to the end of the stage")}
    )


@dataclass
class StageConfig:
    """A run's phases, in order.

    Attributes:
        name: of the stage, for records.
        phases: stretches of training, one after another.
        scale: multiplies sequence lengths, limits of buckets, tokens, batches and schedule lengths alike, so that the
            number of steps and of rows in a batch stay as they are.
        token_scale: multiplies tokens and schedule lengths again, for fewer steps.
        batch_scale: multiplies batches again, for fewer rows.
        preference: train on preference pairs, which the corpora must hold; null trains on next tokens.
    """

    name: str
    phases: list[PhaseConfig]
    scale: float = field(default=1.0, metadata=above(0, fix="1 is unscaled"))
    token_scale: float = field(default=1.0, metadata=above(0, fix="1 is unscaled"))
    batch_scale: float = field(default=1.0, metadata=above(0, fix="1 is unscaled"))
    preference: PreferenceConfig | None = None

    def validate(self) -> None:
        """Refuse empty stages and senseless scales."""
        require(bool(self.phases), "stage.phases", [], "needs at least one phase", "choose +stage=pretrain")
        check_allowed(self, "stage")
        for i, phase in enumerate(self.phases):
            phase.validate(f"stage.phases[{i}]")
        require(self.preference is None or len(self.phases) == 1, "stage.preference", "{...}",
                f"the stage has {len(self.phases)} phases, and what the reference says of the pairs is of one length "
                "of row and one RoPE base", "give the stage one phase")  # fmt: skip
