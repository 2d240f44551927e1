"""Warm-up of a scaled phase: it keeps some steps, however short the phase becomes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from mmtrain.config import LrSegment, PhaseConfig
from mmtrain.config.schema import Count

MIN_WARMUP_STEPS = 10
_LARGEST_SHARE = 3  # a third of the phase


def is_warmup(segments: Sequence[LrSegment]) -> bool:
    """Tell whether a schedule begins with a rise."""
    return segments[0].kind != "constant" and segments[0].start < segments[0].end


def warmup_steps(phase: PhaseConfig) -> int:
    """Return how many steps the first segment of a phase's schedule takes, or MIN_WARMUP_STEPS if it takes more."""
    ends = itertools.islice(step_ends(phase), MIN_WARMUP_STEPS - 1)
    return next((i for i, end in enumerate(ends, start=1) if end >= phase.lr[0].tokens), MIN_WARMUP_STEPS)


def step_ends(phase: PhaseConfig) -> Iterator[int]:
    """Yield the tokens of the phase that are consumed after each step, as if it had no end."""
    tokens = 0
    while True:
        batch = [point.tokens for point in phase.batch if point.at <= tokens][-1]
        tokens += max(1, round(Fraction(batch, phase.seq_len))) * phase.seq_len
        yield tokens


def keep_warmup(phase: PhaseConfig, scaled: PhaseConfig) -> PhaseConfig:
    """Lengthen the warm-up of a scaled phase to ten steps.

    Scales shorten a schedule in tokens. The paper's 500 steps of warm-up are 0.07% of its tokens, so that a stage of
    1,000 steps would be left without: its first step would run at the full rate. A first segment that rises therefore
    keeps ten steps, or as many as it had unscaled where these are fewer, but no more than a third of the phase. The
    segments after it give the tokens up, in their order, so that the schedule still ends where the phase does.

    Args:
        phase: the phase as it is written.
        scaled: the same with its scales applied.
    """
    if not is_warmup(scaled.lr):
        return scaled
    floor = next(itertools.islice(step_ends(scaled), warmup_steps(phase) - 1, None))
    missing = min(floor, scaled.tokens // _LARGEST_SHARE) - scaled.lr[0].tokens
    if missing <= 0:
        return scaled
    lr = [replace(scaled.lr[0], tokens=Count(scaled.lr[0].tokens + missing))]
    for segment in scaled.lr[1:]:
        given = min(missing, segment.tokens)
        missing -= given
        lr.append(replace(segment, tokens=Count(segment.tokens - given)))
    return replace(scaled, lr=lr)
