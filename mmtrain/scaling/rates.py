"""The best learning rate of each size, and its power law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.scaling.points import Point
from mmtrain.scaling.power import NotSupported

MIN_RATES = 3  # a parabola has three coefficients


@dataclass(frozen=True)
class BestRate:
    """The learning rate at which a size's loss is least.

    Attributes:
        parameters: activated parameters.
        tokens: that all its runs were trained on.
        rate: the best.
        loss: the least, in nats.
        tried: how many rates.
    """

    parameters: float
    tokens: float
    rate: float
    loss: float
    tried: int


def best_rates(points: Sequence[Point]) -> tuple[list[BestRate], list[str]]:
    """Return the best rate of each size, and why sizes have none.

    Runs are compared that differ in the rate alone: of one size, tokens and batch. Of a size with several such sets,
    that of most tokens counts.
    """
    sets: dict[tuple[float, float, float], list[Point]] = {}
    for point in points:
        sets.setdefault((point.activated, float(f"{point.tokens:.2g}"), point.batch_tokens), []).append(point)
    found: dict[float, BestRate] = {}
    refused: list[str] = []
    for key in sorted(sets):
        if len({point.learning_rate for point in sets[key]}) < 2:
            continue
        try:
            found[key[0]] = _best(sets[key])
        except NotSupported as error:
            refused.append(str(error))
    return list(found.values()), refused


def _best(points: Sequence[Point]) -> BestRate:
    """Return the minimum of a parabola of loss over ln lr through the three rates about the best one."""
    best: dict[float, float] = {}
    for point in points:
        best[point.learning_rate] = min(point.loss, best.get(point.learning_rate, math.inf))
    rates, size = sorted(best), points[0].activated
    if len(rates) < MIN_RATES:
        raise NotSupported(
            f"the best learning rate of {size:.3g} parameters needs {MIN_RATES} rates; it has {len(rates)}"
        )
    place = min(range(len(rates)), key=lambda i: best[rates[i]])
    if place in (0, len(rates) - 1):
        raise NotSupported(
            f"the best learning rate of {size:.3g} parameters is at the end of those tried, {rates[place]:.3g}; "
            f"add {'smaller' if place == 0 else 'larger'} ones"
        )
    near = rates[place - 1 : place + 2]
    centre = math.log(near[1])
    square, slope, level = np.polyfit(np.log(near) - centre, [best[rate] for rate in near], 2)
    where = -slope / (2 * square) if square > 0 else 0.0
    low = float(np.polyval([square, slope, level], where))
    return BestRate(size, points[0].tokens, math.exp(centre + where), low, len(rates))
