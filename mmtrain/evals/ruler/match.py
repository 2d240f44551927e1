"""Scores of generated answers: which of the expected texts they hold (RULER's string match)."""

from __future__ import annotations

from collections.abc import Sequence


def share_found(text: str, answers: Sequence[str]) -> float:
    """Return the percentage of the answers that stand in a text, whatever their case."""
    return 100 * sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def one_found(text: str, answers: Sequence[str]) -> float:
    """Return 100 if any of the answers stands in a text, whatever its case, else 0."""
    return 100.0 * any(answer.lower() in text.lower() for answer in answers)
