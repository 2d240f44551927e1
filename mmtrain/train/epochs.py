"""How often a run reads each corpus, and what of it deserves a warning."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mmdata.corpus.split import ENOUGH_TOKENS
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import RunPlan


@dataclass(frozen=True)
class SourceUse:
    """Use of one corpus in one phase.

    Attributes:
        phase: number of the phase.
        option, path: the source as it was given.
        corpus: names the corpus wherever it lies: equal for every source that is the same corpus.
        consumed: tokens that the phase reads of it (rows' tokens, so padding counts).
        tokens: training tokens of the corpus, or of those documents of it that are read.
        from_tokens, below: lengths of the documents that are read, below `below` (None: any).
        limit: times that a run may read the corpus; None is any number.
        limit_option: names the option that says so.
    """

    phase: int
    option: str
    path: str
    corpus: str
    consumed: float
    tokens: int
    from_tokens: int = 0
    below: int | None = None
    limit: float | None = None
    limit_option: str = "data.max_epochs"

    @property
    def epochs(self) -> float:
        """Times that the phase reads the corpus."""
        return self.consumed / self.tokens


def tokens_by_phase(plan: RunPlan, last_step: int | None = None) -> list[int]:
    """Return the tokens of the rows that each phase of a run reads, up to a step of the run (None: its end)."""
    left, found = sys.maxsize if last_step is None else last_step, []
    for phase in plan.phases:
        steps, tokens = phase.left(0, left)
        left -= steps
        found.append(tokens)
    return found


def shared_out(tokens: int, weights: Sequence[float]) -> list[float]:
    """Return the tokens that each source of a mixture contributes: its weight's share."""
    total = sum(Fraction(weight) for weight in weights)
    return [float(tokens * Fraction(weight) / total) for weight in weights]


@dataclass(frozen=True)
class Reading:
    """All that a run reads of those documents of a corpus that the same uses read: the corpus, or a range of lengths.

    Attributes:
        uses: of the documents.
        lengths: in words; empty for all documents.
    """

    uses: tuple[SourceUse, ...]
    lengths: str

    @property
    def epochs(self) -> float:
        """Times that the run reads the documents."""
        return sum(use.epochs for use in self.uses)

    @property
    def limit(self) -> float:
        """Lowest limit of the uses."""
        return min((use.limit for use in self.uses if use.limit is not None), default=float("inf"))

    @property
    def told(self) -> str:
        """Epochs over the limit in words."""
        name = next(use.limit_option for use in self.uses if use.limit == self.limit)
        which = f" ({self.lengths})" if self.lengths else ""
        return f"is read {_times(self.epochs)} times over{which}, more than {name}={self.limit:g}"


def epoch_lines(uses: Sequence[SourceUse], phase_names: Sequence[str]) -> list[str]:
    """Return a line for each corpus, or range of lengths of it: how often the run reads it, and in which phases."""
    lines = []
    for one in readings(uses):
        first = one.uses[0]
        if one.lengths:
            by_phase = {use.phase: 0.0 for use in one.uses}  # the whole corpus and a bucket of it, in a transition
            for use in one.uses:
                by_phase[use.phase] += use.epochs
            detail = ", ".join(f"{phase_names[phase]} {_times(epochs)}" for phase, epochs in by_phase.items())
            lines.append(f"corpus {first.path}, {one.lengths}: {_times(one.epochs)} epochs ({detail})")
            continue
        parts = [f"{phase_names[use.phase]} {_times(use.epochs)}" for use in one.uses]
        detail = f" ({', '.join(parts)})" if len(one.uses) > 1 else ""
        total = f"{_count(sum(use.consumed for use in one.uses))} of its {_count(first.tokens)} training tokens"
        lines.append(f"corpus {first.path}: {_times(one.epochs)} epochs, {total}{detail}")
    return lines


def epoch_warnings(uses: Sequence[SourceUse], phase_names: Sequence[str]) -> list[str]:
    """Return a warning for each corpus, or range of lengths, that the run reads more often than its limit."""
    return [
        f"warning: {one.uses[0].option}={one.uses[0].path} {one.told}, in {phase_names[_passed_in(one)]}: good text "
        "bears about 4 epochs, poor text 2; give more text or train less"
        for one in readings(uses)
        if one.epochs > one.limit
    ]


def check_epochs(uses: Sequence[SourceUse]) -> None:
    """Refuse a run that reads a corpus more often than its limit.

    Raises:
        ConfigError: naming all of them in one line.
    """
    over = [one for one in readings(uses) if one.epochs > one.limit]
    if not over:
        return
    first = over[0].uses[0]
    others = "".join(f"; {one.uses[0].option}={one.uses[0].path} {one.told}" for one in over[1:])
    fix = "give more text, train less, raise the limit, or data.strict_epochs=false for a warning"
    raise ConfigError(first.option, first.path, f"{over[0].told}{others}", fix)


def readings(uses: Sequence[SourceUse]) -> list[Reading]:
    """Return what the run reads, in parts that are as small as the uses tell documents apart by length."""
    found = []
    for group in _by_corpus(uses):
        edges = sorted({use.from_tokens for use in group} | {use.below for use in group if use.below is not None})
        for low, high in zip(edges, [*edges[1:], None], strict=True):
            covering = tuple(
                use
                for use in group
                if use.from_tokens <= low and (use.below is None or (high or math.inf) <= use.below)
            )
            if covering:
                found.append(Reading(covering, "" if len(edges) == 1 else _lengths(low, high)))
    return found


def _passed_in(one: Reading) -> int:
    """Return the phase in which a limit is passed."""
    total = 0.0
    for use in sorted(one.uses, key=lambda use: use.phase):
        total += use.epochs
        if total > one.limit:
            return use.phase
    return one.uses[-1].phase


def _lengths(low: int, below: int | None) -> str:
    if below is None:
        return f"documents of {low:,} tokens or more"
    return f"documents of {low:,} to {below - 1:,} tokens" if low else f"documents below {below:,} tokens"


def held_out_warning(source: str, tokens: int, longest_row: int) -> str | None:
    """Return a warning where the held-out part is too small to measure a loss by, else None.

    Args:
        source: names the corpus.
        tokens: held-out tokens, 0 where nothing is held out.
        longest_row: tokens in the longest row that is validated.
    """
    if tokens == 0:
        return f"warning: {source} has no held-out text: there is nothing to validate on (data.valid_rows=0 says so)"
    if tokens < max(ENOUGH_TOKENS, longest_row):
        why = f"less than a row of {longest_row:,}" if tokens < longest_row else f"fewer than {ENOUGH_TOKENS:,}"
        return (
            f"warning: {source} holds out {tokens:,} tokens, {why}: too few to measure a loss by; "
            "hold out more (launch/prepare.py --valid-fraction, or data.valid_fraction)"
        )
    return None


def _by_corpus(uses: Sequence[SourceUse]) -> list[list[SourceUse]]:
    groups: dict[str, list[SourceUse]] = {}
    for use in uses:
        if use.consumed > 0:
            groups.setdefault(use.corpus, []).append(use)
    return list(groups.values())


def _times(epochs: float) -> str:
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"


def _count(tokens: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:,.0f}"
