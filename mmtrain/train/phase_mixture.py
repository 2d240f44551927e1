"""What each phase reads: shares of documents by source and length, and how they change over the phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mmdata.corpus.documents import Documents
from mmdata.rows.share_schedule import Segment
from mmtrain.config import BucketConfig, DataConfig, PhaseConfig, SourceConfig
from mmtrain.config.checks import choose
from mmtrain.errors import ConfigError

Shares = Mapping["Part", Fraction]
"""Share of each part in the tokens; 1 in sum, none of them 0."""


@dataclass(frozen=True)
class Part:
    """Documents of a corpus with `from_tokens` tokens or more, and fewer than `below` (None: any number).

    Attributes:
        path: of the corpus.
    """

    path: str
    from_tokens: int = 0
    below: int | None = None

    def __str__(self) -> str:
        if self.below is None:
            return self.path if not self.from_tokens else f"{self.path} from {self.from_tokens:,} tokens"
        return f"{self.path} below {self.below:,} tokens" if not self.from_tokens else (
            f"{self.path} of {self.from_tokens:,} to {self.below - 1:,} tokens")  # fmt: skip


@dataclass(frozen=True)
class PhaseMixture:
    """Shares over a phase.

    Attributes:
        before: where a transition begins; None without one.
        own: the phase's shares.
        late: shares in its last part; None where they are its own.
        transition, last: shares of the phase's tokens that both stretches are.
    """

    before: Shares | None
    own: Shares
    late: Shares | None
    transition: float = 0.0
    last: float = 0.0

    @property
    def end(self) -> Shares:
        """Shares at the phase's end."""
        return self.late or self.own

    @property
    def parts(self) -> list[Part]:
        """All parts that the phase reads."""
        return list(dict.fromkeys([*(self.before or {}), *self.own, *self.end]))

    def segments(self, rows: int) -> list[Segment]:
        """Segments of the phase's stream, of which the phase is the first `rows` rows. Empty ones are left out."""
        ramp = round(rows * _exact(self.transition)) if self.before else 0
        late = rows - int(rows * _exact(self.last)) if self.late else None
        found = []
        if self.before and ramp:
            found.append(Segment(ramp, self._row(self.before), self._row(self.own)))
        if late is not None and late > ramp:
            found.append(Segment(late - ramp, self._row(self.own), self._row(self.own)))
        return [*found, Segment(None, self._row(self.end), self._row(self.end))]

    def _row(self, shares: Shares) -> tuple[Fraction, ...]:
        return tuple(shares.get(part, Fraction(0)) for part in self.parts)


def phase_mixtures(
    data: DataConfig, phases: Sequence[PhaseConfig], documents: Callable[[Part], Documents]
) -> list[PhaseMixture | None]:
    """Return each phase's mixture by tokens; None for a phase that needs none, whose rows are each of one source.

    Args:
        data: the run's data options.
        phases: scaled.
        documents: training documents of a part.

    Raises:
        ConfigError: a bucket with a share and no document, or a bucket that is not there; of all phases, in one line.
    """
    problems: list[ConfigError] = []
    late = _plain(data.long_sources) if data.long_sources else None
    before, found = _plain(data.all_sources), []
    for i, phase in enumerate(phases):
        sources = phase.sources or data.all_sources
        own = _by_bucket(phase, i, data, documents, problems) if phase.buckets else _plain(sources)
        end = _mixed(own, late, _exact(phase.long_share)) if late and phase.long_share and phase.long_last else None
        moves = phase.transition > 0 and before != own
        mixture = PhaseMixture(before if moves else None, own, end, phase.transition, phase.long_last)
        found.append(mixture if phase.buckets or moves or end else None)
        before = mixture.end
    if problems:
        first = problems[0]
        others = "".join(f"; {one.option}={one.value}: {one.problem}" for one in problems[1:])
        raise ConfigError(first.option, first.value, f"{first.problem}{others}", first.fix)
    return found


def mixture_lines(
    data: DataConfig, phases: Sequence[PhaseConfig], mixtures: Sequence[PhaseMixture | None]
) -> list[str]:
    """Return a line for each phase with a mixture by tokens, and one for each whose long sources are left out."""
    lines = []
    for i, (phase, mixture) in enumerate(zip(phases, mixtures, strict=True)):
        if mixture is not None:
            line = f"mixture of {phase.name}: {_told(mixture.own)}"
            if mixture.before:
                origin = f"the end of {phases[i - 1].name}" if i else "documents of data.sources as they come"
                line += f"; reached over its first {phase.transition:.0%} from {origin}"
            if mixture.late:
                line += f"; in its last {mixture.last:.0%}, {phase.long_share:.0%} are of data.long_sources"
            lines.append(line)
            read = {part.path for part in mixture.own}
            unread = [source.path for _, source in _named(phase, i, data) if source.path not in read]
            lines += [f"mixture of {phase.name}: none of its buckets takes documents of {path}" for path in unread]
        if phase.long_share and not data.long_sources:
            lines.append(
                f"stage.phases[{i}].long_share={phase.long_share:g}: left out, as data.long_sources is empty "
                f"(meant for the last {phase.long_last:.0%} of {phase.name})"
            )
    return lines


def _by_bucket(
    phase: PhaseConfig,
    index: int,
    data: DataConfig,
    documents: Callable[[Part], Documents],
    problems: list[ConfigError],
) -> Shares:
    """Return the shares of a phase with buckets, each shared out among the sources that supply it by their weights."""
    given, found = sum(_exact(bucket.share) for bucket in phase.buckets), dict[Part, Fraction]()
    named = _named(phase, index, data)
    for option, source in named:
        for name in source.buckets or []:
            choose(f"{option}.buckets", name, [bucket.name for bucket in phase.buckets])
    low = 0
    for j, bucket in enumerate(phase.buckets):
        supply = _supply(bucket, low, named, documents)
        total, low = sum(weight for _, weight in supply), bucket.below or 0
        if bucket.share and not supply:
            problems.append(_no_documents(f"stage.phases[{index}].buckets[{j}].share", bucket, named))
        elif bucket.share:
            paths = {part.path for part, _ in supply}
            missing = [one for one in named if bucket.name in (one[1].buckets or []) and one[1].path not in paths]
            problems += [_no_documents(f"{one[0]}.buckets", bucket, [one]) for one in missing]
        for part, weight in supply if bucket.share else []:
            found[part] = found.get(part, Fraction(0)) + _exact(bucket.share) / given * weight / total
    return found


def _supply(
    bucket: BucketConfig, low: int, named: Sequence[tuple[str, SourceConfig]], documents: Callable[[Part], Documents]
) -> list[tuple[Part, Fraction]]:
    """Return the parts that a bucket is made of, with the weights of their sources."""
    allowed = [source for _, source in named if source.buckets is None or bucket.name in source.buckets]
    parts = [(Part(source.path, low, bucket.below), _exact(source.weight)) for source in allowed]
    return [(part, weight) for part, weight in parts if bucket.share and documents(part).num_tokens]


def _no_documents(option: str, bucket: BucketConfig, named: Sequence[tuple[str, SourceConfig]]) -> ConfigError:
    where = ", ".join(dict.fromkeys(source.path for _, source in named))
    lengths = f"below {bucket.below} tokens" if bucket.below else "the longest documents"
    problem = f"no training document of {where} is of bucket {bucket.name} ({lengths})"
    fix = "give a source that has such documents, share=0, or buckets=[] for documents as they come"
    return ConfigError(option, f"{bucket.share:g}", problem, fix)


def _named(phase: PhaseConfig, index: int, data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """Return a phase's sources with the option that each is."""
    if phase.sources:
        return [(f"stage.phases[{index}].sources[{j}]", source) for j, source in enumerate(phase.sources)]
    return [(f"data.sources[{j}]", source) for j, source in enumerate(data.all_sources)]


def _plain(sources: Sequence[SourceConfig]) -> Shares:
    """Return the shares of whole corpora by their weights."""
    total, found = sum(_exact(source.weight) for source in sources), dict[Part, Fraction]()
    for source in sources:
        part = Part(source.path)
        found[part] = found.get(part, Fraction(0)) + _exact(source.weight) / total
    return found


def _mixed(own: Shares, late: Shares, share: Fraction) -> Shares:
    """Return `share` of `late` and the rest of `own`."""
    found = {part: own_share * (1 - share) for part, own_share in own.items()}
    for part, late_share in late.items():
        found[part] = found.get(part, Fraction(0)) + late_share * share
    return found


def _told(shares: Shares) -> str:
    return ", ".join(f"{float(share):.3g} {part}" for part, share in shares.items())


def _exact(value: float) -> Fraction:
    """Return the number that a float was written as: 3/10 for 0.3."""
    return Fraction(repr(float(value)))
