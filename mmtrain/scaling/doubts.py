"""Results whose intervals are too wide to mean anything, said so."""

from __future__ import annotations

from mmtrain.scaling.power import Interval, PowerFit
from mmtrain.scaling.predict import Prediction
from mmtrain.scaling.surface import SurfaceFit

MAX_HALF_WIDTH = 0.5  # of an exponent's or a floor's interval, over its value
MAX_LOSS_HALF_WIDTH = 0.05  # of a predicted loss: more than twice the compute is worth (2^-0.076 is 5%)
MIN_BEND = 1e-3  # of ln C squared: 0.5% of the loss ten times beyond the data
MIN_AGREEING = 0.05  # of the starts; fewer have come to the optimum by luck


def doubt_power(name: str, law: PowerFit, rising: bool) -> list[str]:
    """Return what is doubtful about a power law's exponent.

    Args:
        name: of the law, as `N_opt(C) of the frontier`.
        law: the fit.
        rising: whether the exponent has to be positive; else it has to be negative.
    """
    return _exponent(f"the exponent of {name}", law.alpha, 1 if rising else -1)


def doubt_bend(name: str, law: PowerFit) -> list[str]:
    """Return that L(C) bends away from a power law, where it does beyond doubt: a floor under the loss does that."""
    if law.bend is None or law.bend.low <= 0 or abs(law.bend.value) < MIN_BEND:
        return []
    return [
        f"{name} bends upwards in the logs ({law.bend.text('.2g')}), so a power law predicts too little beyond the "
        "data; L(N, D), which has a floor, is the better guide"
    ]


def doubt_surface(fit: SurfaceFit) -> list[str]:
    """Return what is doubtful about a law of size and data: exponents, floor, and whether the descent found its end."""
    form, found = fit.law.form.split(" = ")[0], []
    for term in fit.law.terms:
        found += _exponent(f"{term.exponent} of {form}", fit.coefficients[term.exponent], -term.sign)
    floor = fit.coefficients[fit.law.constant]
    if floor.relative_half_width > MAX_HALF_WIDTH:
        found.append(f"the data do not support a value of {fit.law.constant} of {form}: {floor.text('.3g')}")
    if fit.agreeing < MIN_AGREEING:
        found.append(
            f"only {fit.agreeing:.0%} of {fit.starts} starts came to the optimum of {form}: it may not be the least"
        )
    return found


def doubt_prediction(prediction: Prediction) -> list[str]:
    """Return what is doubtful about a prediction."""
    loss = prediction.loss
    if loss.relative_half_width <= MAX_LOSS_HALF_WIDTH:
        return []
    return [
        f"the data do not support a prediction by {prediction.method} at {prediction.flops:.3g} FLOP: "
        f"{loss.text('.3f')}, {prediction.beyond:.3g} times the data's most"
    ]


def _exponent(what: str, interval: Interval, sign: int) -> list[str]:
    if min(sign * interval.low, sign * interval.high) <= 0:
        return [f"the data do not support {what}: its interval {interval.text('.3g')} reaches zero"]
    if interval.relative_half_width > MAX_HALF_WIDTH:
        return [f"the data do not support a value of {what}: {interval.text('.3g')}"]
    return []
