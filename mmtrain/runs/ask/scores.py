"""Figures by kind, with what they are held against: chance, and an earlier run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmtrain.runs.ask.answers import KindScore
from mmtrain.runs.ask.pairs import PreferenceScore


@dataclass(frozen=True)
class ScoreLine:
    """A line of a table of figures.

    Attributes:
        kind: of what was asked.
        share: of it that is as it should be.
        asked: how many.
        chance: share that needs no eyes.
        by_chance: what has that share.
        before: the share that an earlier run has; None if none was asked.
    """

    kind: str
    share: float
    asked: int
    chance: float
    by_chance: str
    before: float | None = None


def answer_lines(now: Sequence[KindScore], before: Sequence[KindScore] | None = None) -> list[ScoreLine]:
    """Return the lines of answers, beside those of an earlier run to the same questions."""
    earlier = [None] * len(now) if before is None else [one.accuracy for one in before]
    return [
        ScoreLine(one.kind, one.accuracy, one.asked, one.blind / one.asked, "the commonest answer", was)
        for one, was in zip(now, earlier, strict=True)
    ]


def preference_lines(
    now: Sequence[PreferenceScore], before: Sequence[PreferenceScore] | None = None
) -> list[ScoreLine]:
    """Return the lines of preferences, beside those of an earlier run of the same pairs."""
    earlier = [None] * len(now) if before is None else [one.share for one in before]
    return [
        ScoreLine(one.kind, one.share, one.asked, 0.5, "chance", was) for one, was in zip(now, earlier, strict=True)
    ]
