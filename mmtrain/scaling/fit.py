"""Scaling laws of a sweep: every form that its points support, per architecture, and why others are not supported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from mmtrain.errors import ConfigError
from mmtrain.scaling.batch import CriticalBatch, RampStep, batch_ramp, fit_batch_law, measure_batches
from mmtrain.scaling.compute import ComputeLaws, frontier_laws, isoflop_laws
from mmtrain.scaling.doubts import doubt_bend, doubt_power, doubt_prediction, doubt_surface
from mmtrain.scaling.frontier import find_frontier
from mmtrain.scaling.isoflop import IsoflopMinimum, fit_groups
from mmtrain.scaling.points import Point
from mmtrain.scaling.power import NotSupported, PowerFit, fit_power
from mmtrain.scaling.predict import HeldOut, Prediction, hold_out, hold_out_group, predict_laws, predict_surface
from mmtrain.scaling.rates import BestRate, best_rates
from mmtrain.scaling.surface import CHINCHILLA, MIXTURE, RESAMPLES, SumLaw, SurfaceFit, fit_surface
from mmtrain.scaling.tuned import best_settings

Intermediate = Literal["none", "frontier", "all"]
T = TypeVar("T")


@dataclass
class ArchitectureFit:
    """What was fitted to the points of one architecture (and one number of experts).

    Attributes:
        label: `hybrid`, or `hybrid, 16 experts`.
        architecture: as the points name it.
        experts: routed experts of a layer.
        points: all of them.
        ends: those of ended runs.
        frontier: lower envelope of loss over compute.
        frontier_laws: through the frontier.
        minima: of the isoFLOP groups.
        isoflop_laws: through the minima.
        surface: L(N, D).
        surface_points: those that it was fitted to.
        mixture: L(P, T), of a mixture of experts.
        held_out: predictions of the largest size by fits without it.
        critical: critical batch sizes.
        batch_law: B_crit(L).
        ramp: recommended batches.
        ramp_for: activated parameters and tokens of the run that they are for: the target's, or the largest run's.
        rates: best learning rates.
        rate_law: lr(N).
        predictions: at the target compute.
        refused: forms that the data do not support, and why.
        doubts: results too wide to mean anything.
    """

    label: str
    architecture: str
    experts: int
    points: list[Point]
    ends: list[Point]
    frontier: list[Point] = field(default_factory=list)
    frontier_laws: ComputeLaws | None = None
    minima: list[IsoflopMinimum] = field(default_factory=list)
    isoflop_laws: ComputeLaws | None = None
    surface: SurfaceFit | None = None
    surface_points: list[Point] = field(default_factory=list)
    mixture: SurfaceFit | None = None
    held_out: list[HeldOut] = field(default_factory=list)
    critical: list[CriticalBatch] = field(default_factory=list)
    batch_law: PowerFit | None = None
    ramp: list[RampStep] = field(default_factory=list)
    ramp_for: tuple[float, float] | None = None
    rates: list[BestRate] = field(default_factory=list)
    rate_law: PowerFit | None = None
    predictions: list[Prediction] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def attempt(self, fit: Callable[[], T]) -> T | None:
        """Return what a fit returns; where the data do not support it, note why and return None."""
        try:
            return fit()
        except NotSupported as error:
            self.refused.append(str(error))
            return None


@dataclass(frozen=True)
class FitOptions:
    """How a sweep is fitted.

    Attributes:
        target_flops: compute in FLOP to predict the loss at; None: none.
        intermediate: which fits use validations on the way: none, the frontier's, or all. A loss on the way is only
            that of a shorter run if the learning rate is constant, as in the paper's sweep: say `all` there.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    target_flops: float | None = None
    intermediate: Intermediate = "frontier"
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: which option.
        """
        if self.target_flops is not None and not 0 < self.target_flops < float("inf"):
            raise ConfigError("target_flops", self.target_flops, "it is no compute", "give FLOP, as 1e21")
        if self.intermediate not in ("none", "frontier", "all"):
            raise ConfigError("intermediate", self.intermediate, "it is unknown", "give none, frontier or all")
        if self.resamples < 40:
            raise ConfigError("resamples", self.resamples, "too few for the ends of 95% intervals", "give 40 or more")


def fit_points(points: Sequence[Point], options: FitOptions) -> list[ArchitectureFit]:
    """Fit all that the points support, per architecture and number of experts, in the order of the points."""
    kinds = dict.fromkeys((point.architecture, point.experts) for point in points)
    fits = []
    for architecture, experts in kinds:
        own = [point for point in points if (point.architecture, point.experts) == (architecture, experts)]
        label = architecture + (f", {experts} experts" if experts else "")
        fits.append(_fit(ArchitectureFit(label, architecture, experts, own, [p for p in own if p.final]), options))
    return fits


def _fit(fit: ArchitectureFit, options: FitOptions) -> ArchitectureFit:
    """Try every form in turn."""
    surface_points = best_settings(fit.points if options.intermediate == "all" else fit.ends)
    curve_points = fit.ends if options.intermediate == "none" else fit.points

    def surface(law: SumLaw, points: Sequence[Point]) -> SurfaceFit:
        columns = zip(*((p.activated, p.tokens, p.loss, p.run) for p in points), strict=True) if points else [()] * 4
        return fit_surface(law, *columns, resamples=options.resamples, seed=options.seed)

    fit.frontier = find_frontier(curve_points)
    fit.frontier_laws = fit.attempt(lambda: frontier_laws(curve_points, fit.frontier))
    fit.minima, refused = fit_groups(fit.ends)
    fit.refused += refused
    if any(point.group is not None for point in fit.ends):
        fit.isoflop_laws = fit.attempt(lambda: isoflop_laws(fit.minima))
    fit.surface = fit.attempt(lambda: surface(CHINCHILLA, surface_points))
    if fit.experts:
        fit.mixture = fit.attempt(lambda: surface(MIXTURE, surface_points))
    fit.surface_points = surface_points
    fit.held_out, refused = hold_out(surface_points, curve_points, lambda points: surface(CHINCHILLA, points))
    fit.refused += refused
    if fit.isoflop_laws:
        held = fit.attempt(lambda: hold_out_group(fit.minima))
        fit.held_out += [held] if held else []
    if fit.surface is None and options.intermediate != "all" and len(fit.ends) < len(fit.points):
        fit.refused.append(
            f"{len(fit.points) - len(fit.ends)} validations on the way were not used for L(N, D): if the learning rate "
            "is constant, their losses are those of shorter runs, and intermediate=all uses them"
        )
    if options.target_flops is not None:
        fit.predictions = _predict(fit, options.target_flops)
    _fit_batches(fit)
    _fit_rates(fit)
    fit.doubts = _doubts(fit)
    return fit


def _predict(fit: ArchitectureFit, flops: float) -> list[Prediction]:
    """Predict the loss at a compute by every fit there is."""
    named = (("frontier", fit.frontier_laws), ("isoFLOP", fit.isoflop_laws))
    found = [predict_laws(name, laws, fit.points, flops) for name, laws in named if laws]
    return found + [predict_surface(law, fit.points, flops) for law in (fit.surface, fit.mixture) if law]


def _fit_batches(fit: ArchitectureFit) -> None:
    """Fit the critical batch size where several batch sizes were tried, and recommend a ramp.

    The ramp is that of the target's size and tokens, or of the largest run.
    """
    if len({point.batch_tokens for point in fit.points}) < 2:
        return
    fit.critical = fit.attempt(lambda: measure_batches(fit.points)) or []
    if not fit.critical:
        return
    fit.batch_law = fit.attempt(lambda: fit_batch_law(fit.critical))
    if fit.batch_law and fit.surface:
        best = next((p for p in fit.predictions if p.method == "L(N, D)" and p.parameters and p.tokens), None)
        largest = max(fit.points, key=lambda point: (point.activated, point.tokens))
        size, tokens = largest.activated, largest.tokens
        if best and best.parameters and best.tokens:
            size, tokens = best.parameters.value, best.tokens.value
        law, surface = fit.batch_law, fit.surface
        fit.ramp = fit.attempt(lambda: batch_ramp(law, surface, size, tokens)) or []
        fit.ramp_for = (size, tokens)


def _fit_rates(fit: ArchitectureFit) -> None:
    """Fit the best learning rate of each size where several were tried."""
    fit.rates, refused = best_rates(fit.ends)
    fit.refused += refused
    if fit.rates:
        sizes, rates = [one.parameters for one in fit.rates], [one.rate for one in fit.rates]
        fit.rate_law = fit.attempt(lambda: fit_power(sizes, rates, "lr(N)"))


def _doubts(fit: ArchitectureFit) -> list[str]:
    """Return what is too wide to mean anything."""
    found: list[str] = []
    for name, laws in (("frontier", fit.frontier_laws), ("isoFLOP minima", fit.isoflop_laws)):
        for form, law in laws.named().items() if laws else ():
            found += doubt_power(f"{form} of the {name}", law, rising=form != "L(C)")
        found += doubt_bend(f"L(C) of the {name}", laws.loss) if laws else []
    for law in (fit.surface, fit.mixture):
        found += doubt_surface(law) if law else []
    for prediction in fit.predictions:
        found += doubt_prediction(prediction)
    if fit.batch_law:
        found += doubt_power("B_crit(L)", fit.batch_law, rising=False)
    return found
