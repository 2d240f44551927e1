"""The frontier of loss over compute: the points that no mix of two others undercuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from mmtrain.scaling.points import Point

BAND = 2e-3  # in log loss, about what two seeds differ by: noise would else leave a few lucky points


def find_frontier(points: Sequence[Point]) -> list[Point]:
    """Return the frontier, by ascending compute.

    It is the falling part of the lower convex hull of log loss over log compute, and what lies 0.2% above it at most:
    where training curves of several sizes cross, the hull touches each near the compute at which it is the best, while
    the points that merely undercut all others reach to the crossings. The ends are cut, as no neighbour bounds them: of
    the size that the frontier begins with only its last point in a row counts, of the one that it ends with only the
    first. Points of a single size are all returned.
    """
    hull = _hull(points)
    if not hull:
        return []
    line_x, line_y = np.array([_place(point) for point in hull]).T
    near = []
    for point in sorted(points, key=lambda point: (point.flops, point.loss)):
        x, y = _place(point)
        if x <= line_x[-1] and y <= float(np.interp(x, line_x, line_y)) + BAND:
            near.append(point)
    if len({point.activated for point in points}) == 1:
        return near
    rows = [list(row) for _, row in groupby(near, key=lambda point: point.activated)]
    rows[0] = rows[0][-1:]
    rows[-1] = rows[-1][:1]
    return [point for row in rows for point in row]


def _hull(points: Sequence[Point]) -> list[Point]:
    """Return the corners of the falling part of the lower convex hull, by ascending compute."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda point: (point.flops, point.loss)):
        if hull and (point.flops == hull[-1].flops or point.loss >= hull[-1].loss):
            continue
        while len(hull) > 1 and _above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(middle: Point, left: Point, right: Point) -> bool:
    """Tell whether the middle point lies on or above the line between its neighbours."""
    (x, y), (first, start), (last, end) = (_place(point) for point in (middle, left, right))
    return y >= start + (end - start) * (x - first) / (last - first)


def _place(point: Point) -> tuple[float, float]:
    return float(np.log(point.flops)), float(np.log(point.loss))
