"""The critical batch size, its law over loss, and the batches that it recommends.

A loss is reached after tokens T(B) = T_min (1 + B / B_crit), where B is the tokens of a batch (McCandlish et al. 2018,
arXiv 1812.06162, eq. 2.11, with T = B S): at B_crit twice the fewest tokens are spent. MiniMax-01 section 4.2 fits
B_crit as a power of the loss on small models, and doubles the batch when the loss reaches that of the next size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.scaling.points import Point
from mmtrain.scaling.power import NotSupported, PowerFit, fit_power
from mmtrain.scaling.surface import SurfaceFit

MIN_BATCHES = 3  # two unknowns, and one batch to see an error by
LEVELS = 6  # losses at which it is measured


@dataclass(frozen=True)
class CriticalBatch:
    """The critical batch size at one loss.

    Attributes:
        loss: in nats a token.
        tokens: of the critical batch.
        parameters: activated parameters of the model it was measured on.
        error: root mean square of T(B) about the line, over T(B).
    """

    loss: float
    tokens: float
    parameters: float
    error: float


@dataclass(frozen=True)
class RampStep:
    """A batch of the ramp.

    Attributes:
        batch_tokens: tokens of the batch.
        loss: at which it begins; infinite for the first.
        tokens: trained on when it begins, by L(N, D).
    """

    batch_tokens: float
    loss: float
    tokens: float


def measure_batches(points: Sequence[Point]) -> list[CriticalBatch]:
    """Measure the critical batch size at a few losses, on the size that was trained with the most batch sizes.

    Of a batch size that was tried at several learning rates, the run counts that reaches a loss with fewest tokens.

    Raises:
        NotSupported: no size was trained with three batch sizes and validated on the way; their losses have no common
            range; or larger batches need no more tokens.
    """
    by_size: dict[float, dict[float, list[Point]]] = {}
    for point in points:
        by_size.setdefault(point.activated, {}).setdefault(point.batch_tokens, []).append(point)
    curves_of = {size: {batch: _curves(own) for batch, own in tried.items()} for size, tried in by_size.items()}
    usable = {size: {batch: own for batch, own in tried.items() if own} for size, tried in curves_of.items()}
    size, curves = max(usable.items(), key=lambda item: len(item[1]))
    if len(curves) < MIN_BATCHES:
        raise NotSupported(
            f"B_crit(L) needs {MIN_BATCHES} batch sizes at one model size, validated on the way; "
            f"there are {len(curves)} at most"
        )
    low = max(min(losses[-1] for _, losses in found) for found in curves.values())
    high = min(max(losses[0] for _, losses in found) for found in curves.values())
    if low >= high:
        raise NotSupported(
            f"B_crit(L) needs losses that all batch sizes pass; one ends at {low:.3f}, one starts at {high:.3f}"
        )
    return [_measure(curves, float(loss), size) for loss in np.geomspace(high, low, LEVELS)]


def fit_batch_law(measured: Sequence[CriticalBatch]) -> PowerFit:
    """Fit B_crit = beta L^alpha; as the losses share training curves, the intervals are those of three points.

    Raises:
        NotSupported: fewer than three losses.
    """
    losses, tokens = [one.loss for one in measured], [one.tokens for one in measured]
    return fit_power(losses, tokens, "B_crit(L)", independent=MIN_BATCHES)


def batch_ramp(law: PowerFit, surface: SurfaceFit, parameters: float, tokens: float) -> list[RampStep]:
    """Recommend a batch at each stretch of a run: doubled whenever the loss makes twice the batch critical.

    It starts with the power of two at or below the critical batch of the loss that 1% of the tokens give.

    Args:
        law: B_crit(L).
        surface: L(N, D).
        parameters: activated parameters of the run's model.
        tokens: that the run will see.
    """
    curve = np.geomspace(tokens / 1e4, tokens, 2000)
    losses = surface.losses(np.full_like(curve, parameters), curve)[0]
    batch = 2.0 ** math.floor(math.log2(law.at(float(np.interp(tokens / 100, curve, losses))).value))
    ramp = [RampStep(batch, math.inf, 0.0)]
    while (loss := law.solve(2 * batch)) > losses[-1] and law.alpha.value < 0:
        batch *= 2
        ramp.append(RampStep(batch, loss, float(curve[int(np.argmax(losses <= loss))])))
    return ramp


def _curves(points: Sequence[Point]) -> list[tuple[list[float], list[float]]]:
    """Return (tokens, losses) of each run with two points or more, where the loss is lower than ever before."""
    curves = []
    for run in dict.fromkeys(point.run for point in points):
        tokens: list[float] = []
        losses: list[float] = []
        for point in sorted((point for point in points if point.run == run), key=lambda point: point.tokens):
            if not losses or point.loss < losses[-1]:
                tokens.append(point.tokens)
                losses.append(point.loss)
        if len(losses) > 1:
            curves.append((tokens, losses))
    return curves


def _measure(curves: dict[float, list[tuple[list[float], list[float]]]], loss: float, size: float) -> CriticalBatch:
    """Fit the line of tokens over batch at one loss, in relative errors."""
    batches = np.array(sorted(curves))
    tokens = np.array([min(_reach(curve, loss) for curve in curves[batch]) for batch in sorted(curves)])
    slope, fewest = np.polyfit(batches, tokens, 1, w=1 / tokens)
    if slope <= 0 or fewest <= 0:
        raise NotSupported(
            f"B_crit(L) at loss {loss:.3f}: tokens do not grow with the batch as T (1 + B/B_crit) does; "
            "try batches of a wider range"
        )
    error = float(np.sqrt(np.mean((np.polyval([slope, fewest], batches) / tokens - 1) ** 2)))
    return CriticalBatch(loss, float(fewest / slope), size, error)


def _reach(curve: tuple[list[float], list[float]], loss: float) -> float:
    """Return the tokens at which a curve reaches a loss, between its points in the logs; infinite where it does not."""
    tokens, losses = (np.log(values) for values in curve)
    target = math.log(loss)
    if not losses[-1] - 1e-12 <= target <= losses[0] + 1e-12:
        return math.inf
    return math.exp(float(np.interp(target, losses[::-1], tokens[::-1])))
