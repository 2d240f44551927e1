"""The learning rate as a function of consumed tokens (MiniMax-01 section 4.2 gives its phases in tokens)."""

from __future__ import annotations

from collections.abc import Sequence

from mmtrain.config import LrSegment
from mmtrain.config.stage import LR_KINDS


def lr_at(segments: Sequence[LrSegment], tokens: int) -> float:
    """Return the learning rate of the step that ends at `tokens`.

    Counting to the end of the step makes the first of 500 warm-up steps run at lr/500 and the 500th at lr, and lets a
    step that ends on a boundary belong to the segment before it. After the last segment its end value holds on.

    Args:
        segments: linear, constant and exponential stretches, in order; at least one.
        tokens: tokens consumed at the end of the step.
    """
    begin = 0
    for segment in segments:
        if segment.tokens and tokens <= begin + segment.tokens:
            return _inside(segment, (tokens - begin) / segment.tokens)
        begin += segment.tokens
    return segments[-1].end


def _inside(segment: LrSegment, fraction: float) -> float:
    """Evaluate one segment at `fraction` of its length, exactly `end` at its end."""
    if fraction == 1.0:
        return segment.end
    return LR_KINDS[segment.kind](segment.start, segment.end, fraction)
