"""Losses that fits predict: at a target compute, and of the largest size by fits that have not seen it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.scaling.compute import ComputeLaws, frontier_laws, isoflop_laws
from mmtrain.scaling.frontier import find_frontier
from mmtrain.scaling.isoflop import IsoflopMinimum
from mmtrain.scaling.paper import PFLOP_S_DAY
from mmtrain.scaling.points import Point
from mmtrain.scaling.power import MIN_POINTS, Interval, NotSupported
from mmtrain.scaling.surface import SurfaceFit, distinct, percentiles

GRID = 1500  # sizes that are tried, over some 8 decades: 1.2% from one to the next


@dataclass(frozen=True)
class Prediction:
    """The loss at a compute by one fit.

    Attributes:
        method: which.
        flops: the compute in FLOP.
        beyond: it, over the most compute of a point.
        loss: in nats a token.
        parameters: activated parameters to spend it on; None where the fit does not tell.
        tokens: to train them on.
    """

    method: str
    flops: float
    beyond: float
    loss: Interval
    parameters: Interval | None
    tokens: Interval | None


@dataclass(frozen=True)
class HeldOut:
    """The largest size's loss by a fit without that size, or the largest group's by one without that group.

    Attributes:
        method: which fit.
        parameters: the size.
        flops: compute of the point.
        measured: its loss.
        predicted: by the fit.
    """

    method: str
    parameters: float
    flops: float
    measured: float
    predicted: Interval

    @property
    def error(self) -> float:
        """Return predicted over measured, less 1."""
        return self.predicted.value / self.measured - 1


def predict_laws(method: str, laws: ComputeLaws, points: Sequence[Point], flops: float) -> Prediction:
    """Predict by power laws over compute."""
    compute, beyond = flops / PFLOP_S_DAY, flops / max(point.flops for point in points)
    size, tokens = (law.at(compute) if law else None for law in (laws.parameters, laws.tokens))
    return Prediction(method, flops, beyond, laws.loss.at(compute), size, tokens)


def predict_surface(fit: SurfaceFit, points: Sequence[Point], flops: float) -> Prediction:
    """Predict by L(N, D): the least loss over sizes that the compute pays for.

    A parameter and token cost what they cost in the points: flops/(N D) by size, that of the largest size beyond it.
    """
    per_size: dict[float, list[float]] = {}
    for point in points:
        per_size.setdefault(point.activated, []).append(point.flops / point.activated / point.tokens)
    sizes = np.array(sorted(per_size))
    costs = np.array([float(np.median(per_size[size])) for size in sorted(per_size)])
    grid = np.geomspace(sizes[0] / 100, 1e4 * sizes[-1], GRID)
    tokens = flops / grid / np.interp(np.log(grid), np.log(sizes), costs)
    losses_Sn = fit.losses(grid, tokens)
    best_S = losses_Sn.argmin(axis=1)
    return Prediction(
        fit.law.form.split(" = ")[0],
        flops,
        flops / max(point.flops for point in points),
        percentiles(losses_Sn.min(axis=1)),
        percentiles(grid[best_S]),
        percentiles(tokens[best_S]),
    )


def hold_out(
    points: Sequence[Point], curve_points: Sequence[Point], fit: Callable[[Sequence[Point]], SurfaceFit]
) -> tuple[list[HeldOut], list[str]]:
    """Predict the largest size by L(N, D) and by L(C), fitted without it.

    Args:
        points: those that L(N, D) is fitted to.
        curve_points: those that the frontier is found among.
        fit: fits L(N, D).

    Returns:
        Predictions, and why there are none.
    """
    held, refused = [], []
    for method in (lambda: _hold_out_surface(points, fit), lambda: _hold_out_frontier(curve_points)):
        try:
            held.append(method())
        except NotSupported as error:
            refused.append(f"held-out largest size: {error}")
    return held, refused


def hold_out_group(minima: Sequence[IsoflopMinimum]) -> HeldOut:
    """Predict the least loss of the isoFLOP group of most compute by the other groups' L(C).

    Raises:
        NotSupported: fewer than four groups.
    """
    last = minima[-1]
    if len(minima) < MIN_POINTS + 1:
        raise NotSupported(f"held-out largest isoFLOP group: needs {MIN_POINTS + 1} groups; there are {len(minima)}")
    predicted = isoflop_laws(minima[:-1]).loss.at(last.flops / PFLOP_S_DAY)
    return HeldOut("L(C) of isoFLOP minima", last.parameters, last.flops, last.loss, predicted)


def _hold_out_surface(points: Sequence[Point], fit: Callable[[Sequence[Point]], SurfaceFit]) -> HeldOut:
    rest, largest = _split(points)
    point = max(largest, key=lambda point: point.flops)
    fitted = fit(rest)
    return _held("L(N, D)", point, fitted.at(point.activated, point.tokens))


def _hold_out_frontier(points: Sequence[Point]) -> HeldOut:
    rest, largest = _split(points)
    law = frontier_laws(rest).loss
    sizes = {point.activated for point in largest}
    seen = [point for point in find_frontier(points) if point.activated in sizes]
    if not seen:
        raise NotSupported("L(C) cannot be tried on it, as it is nowhere on the frontier")
    return _held("L(C)", seen[-1], law.at(seen[-1].flops / PFLOP_S_DAY))


def _split(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Return the points without the largest size, and those of it."""
    if not points:
        raise NotSupported("no run has ended")
    border = distinct([point.activated for point in points])[-1]
    if all(point.activated >= border for point in points):
        raise NotSupported("there is no other size")
    return [p for p in points if p.activated < border], [p for p in points if p.activated >= border]


def _held(method: str, point: Point, predicted: Interval) -> HeldOut:
    return HeldOut(method, point.activated, point.flops, point.loss, predicted)
