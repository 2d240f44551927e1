"""The runs of a sweep that count for laws of size: those with the best learning rate and batch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mmtrain.scaling.points import Point


def best_settings(points: Sequence[Point]) -> list[Point]:
    """Return the points of the best learning rate and batch at each size and amount of data.

    Runs that were badly tuned say nothing about size. Runs that differ in their seed alone are all kept.
    """
    cells: dict[tuple[float, str | None, str], dict[tuple[float, float], list[Point]]] = {}
    for point in points:
        cell = cells.setdefault((point.activated, point.group, f"{point.tokens:.2g}"), {})
        cell.setdefault((point.learning_rate, point.batch_tokens), []).append(point)
    kept = {id(p) for cell in cells.values() for p in min(cell.values(), key=lambda own: fmean(p.loss for p in own))}
    return [point for point in points if id(point) in kept]
