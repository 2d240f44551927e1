"""Needles put into a text of token ids, at ends of sentences."""

from __future__ import annotations

import numpy as np

BREAK_SHARE, BREAK_TOKENS = 64, 256  # a needle moves by up to 1/64 of the text, at most 256 tokens, to a sentence's end


def insert(
    text: np.ndarray, needles: list[tuple[float, np.ndarray]], breaks: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Put needles into a text at their depths, and return it with the first token of each.

    Args:
        text: int64.
        needles: depth, from 0 to 1, and ids of each; those of one depth in the order given.
        breaks: ids after which a sentence has ended: a needle goes to the nearest end that is close by.
    """
    cuts = [_cut(text, depth, breaks) for depth, _ in needles]
    order = sorted(range(len(needles)), key=lambda i: cuts[i])  # stable: as given where they meet
    parts, places, before, added = [], [0] * len(needles), 0, 0
    for i in order:
        ids = needles[i][1]
        parts += [text[before : cuts[i]], ids]
        places[i], before, added = cuts[i] + added, cuts[i], added + len(ids)
    return np.concatenate([*parts, text[before:]]), tuple(places)


def _cut(text: np.ndarray, depth: float, breaks: np.ndarray) -> int:
    """Return where a needle of this depth goes: the nearest end of a sentence, if there is one close by."""
    at = round(depth * len(text))
    if at in (0, len(text)):
        return at
    reach = min(len(text) // BREAK_SHARE, BREAK_TOKENS)
    first = max(at - reach, 1)
    ends = first + np.flatnonzero(np.isin(text[first - 1 : at + reach], breaks))
    return int(ends[np.argmin(np.abs(ends - at))]) if len(ends) else at
