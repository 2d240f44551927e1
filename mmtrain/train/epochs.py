"""How often a run reads each corpus, and what of it deserves a warning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mmdata.corpus.split import ENOUGH_TOKENS
from mmtrain.train.curriculum import RunPlan


@dataclass(frozen=True)
class SourceUse:
    """Use of one corpus in one phase.

    Attributes:
        phase: number of the phase.
        option, path: the source as it was given.
        corpus: names the corpus wherever it lies: equal for every source that is the same corpus.
        consumed: tokens that the phase reads of it (rows' tokens, so padding counts).
        tokens: training tokens of the corpus.
    """

    phase: int
    option: str
    path: str
    corpus: str
    consumed: float
    tokens: int

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


def epoch_lines(uses: Sequence[SourceUse], phase_names: Sequence[str]) -> list[str]:
    """Return a line for each corpus: how often the run reads it, and which phases read how much of that."""
    lines = []
    for group in _by_corpus(uses):
        read = sum(use.consumed for use in group)
        parts = [f"{phase_names[use.phase]} {_times(use.epochs)}" for use in group]
        detail = f" ({', '.join(parts)})" if len(group) > 1 else ""
        total = f"{_count(read)} of its {_count(group[0].tokens)} training tokens"
        lines.append(f"corpus {group[0].path}: {_times(read / group[0].tokens)} epochs, {total}{detail}")
    return lines


def epoch_warnings(uses: Sequence[SourceUse], limit: float | None) -> list[str]:
    """Return a warning for each corpus that the run reads more than `limit` times; None never warns."""
    lines = []
    for group in _by_corpus(uses) if limit is not None else []:
        epochs = sum(use.consumed for use in group) / group[0].tokens
        if epochs > limit:
            lines.append(
                f"warning: {group[0].option}={group[0].path} is read {_times(epochs)} times over, more than "
                f"data.max_epochs={limit:g}: good text bears about 4 epochs, poor text 2; give more text or train less"
            )
    return lines


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
