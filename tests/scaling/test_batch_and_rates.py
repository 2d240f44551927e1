"""Critical batch, its ramp, and learning rates by size, from points made of known laws."""

from itertools import pairwise, product

import numpy as np
import pytest

from mmtrain.scaling.batch import batch_ramp, fit_batch_law, measure_batches
from mmtrain.scaling.power import NotSupported, fit_power
from mmtrain.scaling.rates import best_rates
from mmtrain.scaling.surface import CHINCHILLA, fit_surface
from tests.scaling.made import point, refit_loss

BATCHES = (1e5, 2e5, 4e5, 8e5, 1.6e6)


def critical(loss):
    """Near the paper's measured range: 0.3M to 2M tokens at losses 4.4 to 3.2."""
    return 1.7e9 * loss**-5.8


def batch_points(batches=BATCHES, steps=40, noise=0.0):
    """Training curves of one size: tokens to a loss are those of small batches times (1 + B / B_crit)."""
    rng, points = np.random.default_rng(0), []
    for batch in batches:
        for fewest in np.geomspace(1e8, 2e10, steps):
            loss = refit_loss(1e8, fewest)
            tokens = fewest * (1 + batch / critical(loss)) * np.exp(noise * rng.standard_normal())
            points.append(point(run=f"{batch}", tokens=tokens, loss=loss, batch_tokens=batch, final=False))
    return points


def test_critical_batches_are_measured():
    measured = measure_batches(batch_points())
    assert len(measured) == 6
    for one in measured:
        assert one.tokens == pytest.approx(critical(one.loss), rel=0.03) and one.error < 0.01
    law = fit_batch_law(measured)
    assert law.alpha.value == pytest.approx(-5.8, abs=0.1) and law.freedom == 1
    noisy = fit_batch_law(measure_batches(batch_points(noise=0.02)))
    assert noisy.alpha.low < -5.8 < noisy.alpha.high


def test_the_best_of_several_learning_rates_counts():
    slow = [point(**{**vars(p), "run": p.run + "slow", "tokens": 3 * p.tokens, "flops": None}) for p in batch_points()]
    assert measure_batches([*batch_points(), *slow]) == measure_batches(batch_points())


def test_too_few_batches_are_refused():
    with pytest.raises(NotSupported, match="needs 3 batch sizes at one model size, validated on the way; there are 2"):
        measure_batches(batch_points(BATCHES[:2]))
    with pytest.raises(NotSupported, match="there are 0 at most"):
        measure_batches(batch_points(steps=1))
    apart = [point(**{**vars(p), "loss": p.loss / 3 if p.batch_tokens == 1e5 else p.loss}) for p in batch_points()]
    with pytest.raises(NotSupported, match="losses that all batch sizes pass"):
        measure_batches(apart)
    falling = [point(**{**vars(p), "tokens": p.tokens / p.batch_tokens, "flops": None}) for p in batch_points()]
    with pytest.raises(NotSupported, match="wider range"):
        measure_batches(falling)


def surface():
    size, tokens = np.repeat(np.geomspace(1e8, 1e10, 5), 5), np.tile(np.geomspace(1e9, 1e12, 5), 5)
    return fit_surface(CHINCHILLA, size, tokens, refit_loss(size, tokens), resamples=1)


def test_ramp_doubles_where_the_loss_says():
    losses = np.linspace(2, 4, 5)
    law = fit_power(losses, [critical(loss) for loss in losses], "B_crit(L)")
    ramp = batch_ramp(law, surface(), 3e9, 1e12)
    assert len(ramp) > 2 and ramp[0].tokens == 0
    for before, after in pairwise(ramp):
        assert after.batch_tokens == 2 * before.batch_tokens and after.tokens > before.tokens
        assert critical(after.loss) == pytest.approx(after.batch_tokens)
        assert refit_loss(3e9, after.tokens) == pytest.approx(after.loss, rel=2e-3)
    assert critical(refit_loss(3e9, 1e12)) < 2 * ramp[-1].batch_tokens
    first = critical(refit_loss(3e9, 1e10))
    assert first / 2 < ramp[0].batch_tokens <= first and np.log2(ramp[0].batch_tokens) % 1 == 0


def test_a_law_that_falls_gives_no_ramp():
    rising = fit_power([2.0, 3.0, 4.0], [1e6, 2e6, 4e6], "B_crit(L)")
    assert len(batch_ramp(rising, surface(), 3e9, 1e12)) == 1


def rate_points(sizes, rates, best=lambda n: 0.3 * n**-0.3, **given):
    points = []
    for size, rate in product(sizes, rates):
        loss = refit_loss(size, 1e9) + 0.1 * np.log(rate / best(size)) ** 2
        points.append(point(run=f"{size} {rate}", parameters=size, loss=loss, learning_rate=rate, **given))
    return points


def test_best_rates_follow_their_law():
    rates = np.geomspace(1e-4, 1e-2, 7)
    found, refused = best_rates(rate_points([1e7, 1e8, 1e9], rates))
    assert not refused
    assert [one.rate for one in found] == pytest.approx([0.3 * n**-0.3 for n in (1e7, 1e8, 1e9)])
    law = fit_power([one.parameters for one in found], [one.rate for one in found], "lr(N)")
    assert (law.beta.value, law.alpha.value) == pytest.approx((0.3, -0.3))


def test_rates_that_tell_nothing():
    found, refused = best_rates(rate_points([1e8], [1e-2, 3e-2, 1e-1]))
    assert not found and "at the end of those tried, 0.01; add smaller ones" in refused[0]
    found, refused = best_rates(rate_points([1e8], [1e-3, 2e-3]))
    assert not found and "needs 3 rates; it has 2" in refused[0]
    assert best_rates(rate_points([1e8, 1e9], [1e-3])) == ([], [])
    # Rates are not compared across batches or amounts of data.
    mixed = [({}, 1e-3), ({"tokens": 9e9}, 2e-3), ({"batch_tokens": 1e6}, 4e-3)]
    assert best_rates([rate_points([1e8], [rate], **given)[0] for given, rate in mixed]) == ([], [])
