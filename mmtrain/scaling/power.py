"""Power laws y = beta x^alpha through a few points: a line in the logs, with Student's intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mmtrain.errors import UserError
from mmtrain.scaling.solve import Array

CONFIDENCE = 0.95
MIN_POINTS = 3  # two coefficients, and one degree of freedom for their interval


class NotSupported(UserError):
    """Lack of data for a form: what it needs, and what there is."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def relative_half_width(self) -> float:
        """Half the interval's width over the value's size."""
        return (self.high - self.low) / 2 / abs(self.value) if self.value else math.inf

    def text(self, spec: str = ".4g") -> str:
        """Write `value [low, high]`."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class PowerFit:
    """A fitted law y = beta x^alpha.

    Attributes:
        beta: value at x = 1.
        alpha: exponent.
        scatter: standard deviation of the residuals of ln y.
        bend: coefficient of (ln x)^2 in a parabola through the logs, which is 0 for a power law; None under 4 points.
        residuals: of ln y, in the order of the points.
        points: how many were fitted.
        low_x: smallest x among them.
        high_x: largest.
        freedom: degrees of freedom of the intervals.
    """

    beta: Interval
    alpha: Interval
    scatter: float
    bend: Interval | None
    residuals: tuple[float, ...]
    points: int
    low_x: float
    high_x: float
    freedom: int
    mean_log_x: float
    spread_log_x: float  # sum of squared distances from the mean
    error: float  # standard deviation of a point, as if all were independent

    def at(self, x: float) -> Interval:
        """Return the law's value and its interval at x: of the law, to which a run adds its own scatter."""
        log_x = math.log(x)
        lever = 1 / self.points + (log_x - self.mean_log_x) ** 2 / self.spread_log_x
        middle = math.log(self.beta.value) + self.alpha.value * log_x
        return _exp(middle, student(self.freedom) * self.error * math.sqrt(lever))

    def solve(self, y: float) -> float:
        """Return the x at which the law takes this value."""
        return (y / self.beta.value) ** (1 / self.alpha.value)


def fit_power(x: Sequence[float], y: Sequence[float], form: str, independent: int | None = None) -> PowerFit:
    """Fit ln y = ln beta + alpha ln x by least squares.

    Args:
        x: positive.
        y: positive.
        form: what is fitted, for the message.
        independent: how many of the points tell something of their own, where several are of one training run:
            intervals are as wide as with so many. None: all.

    Raises:
        NotSupported: fewer than 3 points, independent or not, or all at one x.
    """
    own = len(x) if independent is None else min(independent, len(x))
    if own < MIN_POINTS:
        if own < len(x):
            raise NotSupported(f"{form} needs points of {MIN_POINTS} runs; its {len(x)} are of {own}")
        raise NotSupported(f"{form} needs {MIN_POINTS} points; it has {len(x)}")
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    mean, spread = float(log_x.mean()), float(((log_x - log_x.mean()) ** 2).sum())
    if spread < 1e-12:
        raise NotSupported(f"{form} needs points at different places; all {len(x)} lie at {x[0]:.3g}")
    alpha = float(((log_x - mean) * (log_y - log_y.mean())).sum() / spread)
    log_beta = float(log_y.mean()) - alpha * mean
    residuals = log_y - log_beta - alpha * log_x
    scatter = math.sqrt(float((residuals**2).mean()) * own / (own - 2))
    error, quantile = scatter * math.sqrt(len(x) / own), student(own - 2)
    half = quantile * error / math.sqrt(spread)
    return PowerFit(
        beta=_exp(log_beta, quantile * error * math.sqrt(1 / len(x) + mean**2 / spread)),
        alpha=Interval(alpha, alpha - half, alpha + half),
        scatter=scatter,
        bend=_bend(log_x - mean, log_y, own),
        residuals=tuple(residuals.tolist()),
        points=len(x),
        low_x=float(min(x)),
        high_x=float(max(x)),
        freedom=own - 2,
        mean_log_x=mean,
        spread_log_x=spread,
        error=error,
    )


def _bend(x: Array, y: Array, own: int) -> Interval | None:
    """Return the square's coefficient of a parabola, with its interval by so many independent points."""
    if own < MIN_POINTS + 1:
        return None
    design = np.vander(x, 3)
    if np.linalg.matrix_rank(design) < 3:
        return None
    found = np.linalg.lstsq(design, y, rcond=None)[0]
    variance = float(((design @ found - y) ** 2).sum()) / (own - 3) * np.linalg.inv(design.T @ design)[0, 0]
    half = student(own - 3) * math.sqrt(variance)
    return Interval(float(found[0]), float(found[0]) - half, float(found[0]) + half)


def student(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t: exact for one and two degrees of freedom, to 1 in 200 beyond.

    Beyond two it is the Cornish-Fisher expansion about the normal quantile (Abramowitz and Stegun 26.7.5).
    """
    p = 0.5 + CONFIDENCE / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**order for order, term in enumerate(terms, 1))


def _exp(log_value: float, half_width: float) -> Interval:
    """Return the interval of a value whose logarithm has this estimate and half width."""
    value, grow = math.exp(log_value), math.exp(min(half_width, 300.0))
    return Interval(value, value / grow, value * grow)
