"""The laws over compute, L(C), N_opt(C), D_opt(C), through a frontier or through isoFLOP minima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.scaling.frontier import find_frontier
from mmtrain.scaling.isoflop import IsoflopMinimum
from mmtrain.scaling.paper import PFLOP_S_DAY
from mmtrain.scaling.points import Point
from mmtrain.scaling.power import MIN_POINTS, NotSupported, PowerFit, fit_power
from mmtrain.scaling.surface import TOGETHER, distinct


@dataclass(frozen=True)
class ComputeLaws:
    """The laws over compute, C in PFLOP/s-days.

    Attributes:
        loss: L(C).
        parameters: N_opt(C), activated parameters; None where the points do not tell.
        tokens: D_opt(C); likewise.
        why_not: why they do not tell.
    """

    loss: PowerFit
    parameters: PowerFit | None = None
    tokens: PowerFit | None = None
    why_not: str = ""

    def named(self) -> dict[str, PowerFit]:
        """Return the laws that there are, by their form."""
        laws = {"L(C)": self.loss, "N_opt(C)": self.parameters, "D_opt(C)": self.tokens}
        return {form: law for form, law in laws.items() if law}


def frontier_laws(points: Sequence[Point], frontier: Sequence[Point] | None = None) -> ComputeLaws:
    """Fit the laws through the frontier of the points.

    Args:
        points: of one architecture.
        frontier: that of the points, where it is known.

    Raises:
        NotSupported: one size, or a frontier of fewer than three points.
    """
    if len(sizes := distinct([point.activated for point in points])) < 2:
        where = f"all {len(points)} points lie at {sizes[0]:.3g} parameters" if sizes else "there are no points"
        raise NotSupported(f"the frontier needs several sizes; {where}")
    chosen = find_frontier(points) if frontier is None else frontier
    if len(chosen) < MIN_POINTS:
        raise NotSupported(
            f"the frontier needs {MIN_POINTS} points beside its open ends; it has {len(chosen)}: "
            "add sizes, and validations on the way"
        )
    compute = [point.flops / PFLOP_S_DAY for point in chosen]
    runs = len({point.run for point in chosen})
    loss = fit_power(compute, [point.loss for point in chosen], "L(C) of the frontier", runs)
    if why_not := _chosen_ratio(points, chosen):
        return ComputeLaws(loss, why_not=why_not)
    parameters = fit_power(compute, [point.activated for point in chosen], "N_opt(C)", runs)
    tokens = fit_power(compute, [point.tokens for point in chosen], "D_opt(C)", runs)
    return ComputeLaws(loss, parameters, tokens)


def isoflop_laws(minima: Sequence[IsoflopMinimum]) -> ComputeLaws:
    """Fit the laws through the minima of the isoFLOP groups.

    Raises:
        NotSupported: fewer than three minima.
    """
    compute = [minimum.flops / PFLOP_S_DAY for minimum in minima]
    form = "laws through isoFLOP minima"
    return ComputeLaws(
        fit_power(compute, [minimum.loss for minimum in minima], form),
        fit_power(compute, [minimum.parameters for minimum in minima], form),
        fit_power(compute, [minimum.tokens for minimum in minima], form),
    )


def _chosen_ratio(points: Sequence[Point], frontier: Sequence[Point]) -> str:
    """Say why the frontier does not tell size and tokens apart, or nothing where it does."""
    if len(distinct([point.activated for point in frontier])) < MIN_POINTS:
        return f"N_opt(C) and D_opt(C) of the frontier need {MIN_POINTS} sizes on it"
    logs = np.log([[point.activated for point in points], [point.tokens for point in points]])
    if len(distinct(np.exp(logs[1]))) > 1 and float(np.corrcoef(logs)[0, 1]) > TOGETHER:
        return "N_opt(C) and D_opt(C) of the frontier are what the sweep chose: each size has one amount of data"
    return ""
