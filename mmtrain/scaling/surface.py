"""Loss over size and data: a constant and powers, L(N, D) = E + A/N^alpha + B/D^beta, fitted as Hoffmann et al. do.

Hoffmann et al. 2022 (arXiv 2203.15556) section 3.3: Huber's loss of the residual of log loss, delta 1e-3, in the
log-sum-exp form, from a grid of starts. Two things are done as Besiroglu et al. 2024 (arXiv 2404.10102) found that they
must be: the loss is summed, not averaged, and intervals come from refits of resampled runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmtrain.scaling.power import Interval, NotSupported
from mmtrain.scaling.solve import DELTA, Array, log_sum, solve

RESAMPLES = 400
SPLITS, EXPONENTS = (0.3, 0.6, 0.9), (0.1, 0.3, 0.6, 1.0)  # of the grid of starts
SAME_OPTIMUM = 1e-5  # relative; starts whose objectives differ by less have come to the same place
MIN_PLACES = 3  # sizes, and token counts: a power and a constant have three coefficients along each
TOGETHER = 0.995  # correlation of ln N and ln D above which they are one variable


@dataclass(frozen=True)
class Term:
    """A power in a sum: coefficient times a product of variables to one exponent.

    Attributes:
        coefficient: its name.
        exponent: its name.
        variables: which columns of the points are multiplied.
        sign: +1 where the law is written with X^exponent, -1 where with 1/X^exponent.
    """

    coefficient: str
    exponent: str
    variables: tuple[int, ...]
    sign: int


@dataclass(frozen=True)
class SumLaw:
    """A constant and powers of the variables (N, D).

    Attributes:
        form: as it is written.
        constant: its name.
        terms: the powers.
        min_points: what a fit needs: two more than the coefficients.
    """

    form: str
    constant: str
    terms: tuple[Term, ...]

    @property
    def min_points(self) -> int:
        """Return what a fit needs: the coefficients, and two points to see an error by."""
        return 3 + 2 * len(self.terms)


CHINCHILLA = SumLaw(
    "L(N, D) = E + A/N^alpha + B/D^beta", "E", (Term("A", "alpha", (0,), -1), Term("B", "beta", (1,), -1))
)
# MiniMax-01 section 2.4, whose coefficients are not printed. All three coefficients are held positive.
MIXTURE = SumLaw(
    "L(P, T) = d + a P^alpha + b T^beta + c (P T)^gamma",
    "d",
    (Term("a", "alpha", (0,), 1), Term("b", "beta", (1,), 1), Term("c", "gamma", (0, 1), 1)),
)


@dataclass(frozen=True)
class SurfaceFit:
    """A fitted law of size and data.

    Attributes:
        law: its form.
        coefficients: by name, with percentile intervals of the bootstrap.
        residuals: of log loss, measured less fitted, in the order of the points.
        objective: Huber's loss, summed.
        agreeing: share of the starts that came to this optimum.
        starts: how many there were.
        resamples: how many the intervals are from.
    """

    law: SumLaw
    coefficients: dict[str, Interval]
    residuals: tuple[float, ...]
    objective: float
    agreeing: float
    starts: int
    resamples: int
    centre: Array = field(repr=False)  # mean of ln N and ln D
    theta_Sp: Array = field(repr=False)  # the fit, then the resamples

    @property
    def scatter(self) -> float:
        """Root mean square of the residuals of log loss."""
        return float(np.sqrt(np.mean(np.square(self.residuals))))

    def losses(self, size: Array, tokens: Array) -> Array:
        """Return losses [S, n] at sizes and tokens [n]: of the fit in the first row, then of each resample."""
        return np.exp(log_sum(_features(self.law, np.stack([size, tokens]), self.centre), self.theta_Sp)[0])

    def at(self, size: float, tokens: float) -> Interval:
        """Return the law's loss and its interval: of the law, to which a run adds its own scatter."""
        return percentiles(self.losses(np.array([size]), np.array([tokens]))[:, 0])


def fit_surface(
    law: SumLaw,
    size: Sequence[float],
    tokens: Sequence[float],
    loss: Sequence[float],
    runs: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    delta: float = DELTA,
) -> SurfaceFit:
    """Fit a law of size and data.

    Args:
        law: CHINCHILLA or MIXTURE.
        size: activated parameters of each point.
        tokens: trained on.
        loss: in nats a token.
        runs: name of each point's run; runs are resampled whole. None: each point is a run.
        resamples: of the bootstrap, 1 or more.
        seed: of the bootstrap.
        delta: where Huber's loss turns linear.

    Raises:
        NotSupported: too few points, sizes or token counts, or sizes and tokens that go together.
    """
    places, log_loss = np.array([size, tokens], float), np.log(np.asarray(loss, float))
    _require(law, places)
    centre = np.log(places).mean(axis=1)
    features, weights = _features(law, places, centre), np.ones((1, places.shape[1]))
    found = solve(features, log_loss, _starts(law, float(log_loss.min())), weights, delta)
    best = int(found.objective_S.argmin())
    theta, objective = found.theta_Sp[best : best + 1], float(found.objective_S[best])
    drawn = _draw(runs or [str(i) for i in range(len(loss))], resamples, seed)
    refits = solve(features, log_loss, np.repeat(theta, resamples, axis=0), drawn, delta).theta_Sp
    return SurfaceFit(
        law=law,
        coefficients=_named(law, theta_Sp := np.concatenate([theta, refits]), centre),
        residuals=tuple((log_loss - log_sum(features, theta)[0][0]).tolist()),
        objective=objective,
        agreeing=float((found.objective_S <= objective * (1 + SAME_OPTIMUM) + 1e-15).mean()),
        starts=len(found.objective_S),
        resamples=resamples,
        centre=centre,
        theta_Sp=theta_Sp,
    )


def percentiles(values_S: Array) -> Interval:
    """Return the first value, with the 2.5% and 97.5% percentiles of the others."""
    rest = values_S[1:] if len(values_S) > 1 else values_S
    low, high = np.percentile(rest, [2.5, 97.5])
    return Interval(float(values_S[0]), float(low), float(high))


def _require(law: SumLaw, places: Array) -> None:
    """Refuse points that cannot tell the law's coefficients apart."""
    count, (sizes, amounts) = places.shape[1], (len(distinct(row)) for row in places)
    if count < law.min_points or sizes < MIN_PLACES or amounts < MIN_PLACES:
        raise NotSupported(
            f"{law.form} needs {law.min_points} points, at {MIN_PLACES} sizes and {MIN_PLACES} token counts; "
            f"here are {count}, at {sizes} and {amounts}"
        )
    logs = np.log(places)
    if (together := abs(float(np.corrcoef(logs)[0, 1]))) > TOGETHER:
        raise NotSupported(
            f"{law.form} needs sizes trained on different amounts of data; here both grow together "
            f"(correlation of their logs {together:.4f})"
        )


def distinct(values: Sequence[float] | Array, ratio: float = 1.02) -> list[float]:
    """Return the places of values, ascending: those within 2% of one are at the same place."""
    places: list[float] = []
    for value in sorted(map(float, values)):
        if not places or value > ratio * places[-1]:
            places.append(value)
    return places


def _features(law: SumLaw, places: Array, centre: Array) -> Array:
    """Return the features of each term at each point, about the centre, so that coefficients hardly correlate."""
    logs = np.log(places) - centre[:, None]
    features = np.zeros((1 + len(law.terms), places.shape[1], 1 + 2 * len(law.terms)))
    features[0, :, 0] = 1
    for number, term in enumerate(law.terms):
        features[number + 1, :, 2 * number + 1] = 1
        features[number + 1, :, 2 * number + 2] = -logs[list(term.variables)].sum(axis=0)
    return features


def _starts(law: SumLaw, log_low: float) -> Array:
    """Return the grid: shares of the lowest loss that are the constant and each power, and exponents."""
    count, rows = len(law.terms), []
    first = SPLITS if count > 1 else (1.0,)
    for constant, *rest in itertools.product(SPLITS, first, *[EXPONENTS] * count):
        shares = [rest[0]] + [(1 - rest[0]) / (count - 1)] * (count - 1)
        logs = log_low + np.log([constant, *((1 - constant) * np.array(shares))])
        rows.append([logs[0], *itertools.chain(*zip(logs[1:], rest[1:], strict=True))])
    return np.array(rows)


def _draw(runs: Sequence[str], resamples: int, seed: int) -> Array:
    """Return how often each resample has each point: runs are drawn with replacement, and bring all their points."""
    numbers = np.unique(np.asarray(runs), return_inverse=True)[1]
    count = int(numbers.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, numbers].astype(float)


def _named(law: SumLaw, theta_Sp: Array, centre: Array) -> dict[str, Interval]:
    """Return coefficients as the form writes them, moved back from the centre."""
    named = {law.constant: percentiles(np.exp(theta_Sp[:, 0]))}
    for number, term in enumerate(law.terms):
        log, fall = theta_Sp[:, 2 * number + 1], theta_Sp[:, 2 * number + 2]
        named[term.coefficient] = percentiles(np.exp(np.minimum(log + fall * centre[list(term.variables)].sum(), 700)))
        named[term.exponent] = percentiles(-term.sign * fall)
    return named
