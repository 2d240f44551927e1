"""Boxes within a tensor, and spans within a file: whether any two of them have something in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Box = tuple[Sequence[int], Sequence[int]]
"""First index and count in every dimension."""


def are_apart(boxes: Iterable[Box]) -> bool:
    """Tell whether no element lies in two boxes of the same number of dimensions; those without an element are apart.

    They are gone through along the dimension in which most of them begin at places of their own, so that a tensor cut
    in one dimension costs no more than sorting its parts.
    """
    solid = [box for box in boxes if all(box[1])]
    if len(solid) < 2:
        return True
    dimensions = range(len(solid[0][0]))
    axis = max(dimensions, key=lambda one: len({first[one] for first, _ in solid}), default=None)
    if axis is None:
        return False  # the one element of a tensor without dimensions
    open_ones: list[Box] = []
    for first, count in sorted(solid, key=lambda box: box[0][axis]):
        open_ones = [box for box in open_ones if box[0][axis] + box[1][axis] > first[axis]]
        for other, size in open_ones:
            if all(other[i] < first[i] + count[i] and first[i] < other[i] + size[i] for i in dimensions):
                return False
        open_ones.append((first, count))
    return True


def spans_are_apart(spans: Iterable[tuple[int, int]]) -> bool:
    """Tell whether no byte lies in two spans, each from its first byte to the one after its last."""
    reached = 0
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if begin < reached:
            return False
        reached = end
    return True
