"""IsoFLOP groups: runs of different sizes on one compute budget, and the size at which their loss is least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.scaling.points import Point
from mmtrain.scaling.power import NotSupported
from mmtrain.scaling.tuned import best_settings

MIN_SIZES = 3  # a parabola has three coefficients
MAX_SPREAD = 1.1  # of the computes of a group


@dataclass(frozen=True)
class IsoflopMinimum:
    """The parabola of a group: loss = low + curvature (ln N - ln N_opt)^2.

    Attributes:
        group: its label.
        flops: geometric mean of the runs' compute.
        parameters: activated parameters where the loss is least.
        tokens: those that the budget buys there.
        loss: the least.
        curvature: nats for a size e times off.
        scatter: root mean square of the residuals in nats; 0 with three sizes, through which a parabola goes.
        sizes: of the runs, ascending.
        losses: of the runs.
    """

    group: str
    flops: float
    parameters: float
    tokens: float
    loss: float
    curvature: float
    scatter: float
    sizes: tuple[float, ...]
    losses: tuple[float, ...]


def fit_group(group: str, points: Sequence[Point]) -> IsoflopMinimum:
    """Fit the parabola of a group, to the runs of the best learning rate and batch of each size.

    Raises:
        NotSupported: fewer than three sizes, computes that differ by more than a tenth, or no minimum between the
            smallest and the largest size.
    """
    chosen = sorted(best_settings(points), key=lambda point: point.activated)
    if (sizes := len({point.activated for point in chosen})) < MIN_SIZES:
        raise NotSupported(f"isoFLOP group {group} needs {MIN_SIZES} sizes; it has {sizes}")
    computes = [point.flops for point in chosen]
    if (spread := max(computes) / min(computes)) > MAX_SPREAD:
        raise NotSupported(f"isoFLOP group {group} has runs whose computes differ {spread:.2f} times, not one budget")
    x, y = np.log([point.activated for point in chosen]), np.array([point.loss for point in chosen])
    centre = float(x.mean())
    square, slope, level = np.polyfit(x - centre, y, 2)
    where = centre - slope / (2 * square) if square > 0 else math.nan
    if not x[0] < where < x[-1]:
        side = "smaller" if y[0] <= y[-1] else "larger"
        raise NotSupported(
            f"isoFLOP group {group} has no minimum between its sizes {chosen[0].activated:.3g} and "
            f"{chosen[-1].activated:.3g}; " + (f"add {side} ones" if square > 0 else "its losses do not curve upwards")
        )
    tokens = np.polyfit(x - centre, np.log([point.tokens for point in chosen]), 1)
    return IsoflopMinimum(
        group=group,
        flops=math.exp(float(np.mean(np.log(computes)))),
        parameters=math.exp(where),
        tokens=math.exp(float(np.polyval(tokens, where - centre))),
        loss=float(level - slope**2 / (4 * square)),
        curvature=float(square),
        scatter=float(np.sqrt(np.mean((np.polyval([square, slope, level], x - centre) - y) ** 2))),
        sizes=tuple(point.activated for point in chosen),
        losses=tuple(point.loss for point in chosen),
    )


def fit_groups(points: Sequence[Point]) -> tuple[list[IsoflopMinimum], list[str]]:
    """Return the minima by ascending compute, and why groups have none."""
    minima, refused = [], []
    for group in dict.fromkeys(point.group for point in points if point.group is not None):
        try:
            minima.append(fit_group(group, [point for point in points if point.group == group]))
        except NotSupported as error:
            refused.append(str(error))
    return sorted(minima, key=lambda minimum: minimum.flops), refused
