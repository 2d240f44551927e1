"""Frontiers and isoFLOP minima: where they lie, the laws through them, and what is refused."""

import dataclasses

import numpy as np
import pytest

from mmtrain.scaling.compute import frontier_laws, isoflop_laws
from mmtrain.scaling.frontier import find_frontier
from mmtrain.scaling.isoflop import fit_group, fit_groups
from mmtrain.scaling.power import NotSupported
from mmtrain.scaling.tuned import best_settings
from tests.scaling.made import REFIT, curve_points, point, surface_points

SIZES = np.geomspace(7e7, 7e9, 7)
# N_opt grows as C^(beta / (alpha + beta)) and D_opt with the rest (Hoffmann et al. 2022, eq. 4).
EXPONENT = REFIT["beta"] / (REFIT["alpha"] + REFIT["beta"])


def best_loss(flops):
    """The least loss for a compute, and the size that reaches it."""
    sizes = np.geomspace(1e6, 1e12, 20000)
    losses = REFIT["E"] + REFIT["A"] / sizes ** REFIT["alpha"] + REFIT["B"] / (flops / 6 / sizes) ** REFIT["beta"]
    return losses.min(), sizes[losses.argmin()]


def test_frontier_of_curves_is_near_the_best_for_its_compute():
    frontier = find_frontier(curve_points(SIZES, 3e11, steps=60))
    assert len(frontier) > 10 and len({one.activated for one in frontier}) == 7
    for one in frontier[1:-1]:
        loss, size = best_loss(one.flops)
        assert loss <= one.loss < 1.01 * loss
        assert size / 2.2 < one.activated < 2.2 * size
    # Ends are open: a size that nothing bounds gives one point.
    assert frontier[0].activated == SIZES[0] != frontier[1].activated
    assert frontier[-1].activated == SIZES[-1] != frontier[-2].activated


def test_a_size_without_rivals_at_little_compute_does_not_count():
    """Curves of one size in the middle, beside ends: where nothing else was that cheap, it is no frontier."""
    ends = surface_points([5e7, 1e8, 2e8, 4e8, 8e8, 1.6e9], [1e18, 1e19, 1e20])
    frontier = find_frontier([*ends, *curve_points([4e8], 1e11)])
    early = [one for one in frontier if one.flops < 9e17]
    assert len(early) == 1 and len(frontier) > 5


def test_laws_of_the_frontier():
    laws = frontier_laws(curve_points(SIZES, 3e11, noise=1e-3, steps=60))
    assert laws.parameters.alpha.value == pytest.approx(EXPONENT, abs=0.03)
    assert laws.tokens.alpha.value == pytest.approx(1 - EXPONENT, abs=0.03)
    assert laws.parameters.alpha.low < EXPONENT < laws.parameters.alpha.high
    assert laws.loss.bend.low > 0  # there is a floor under the losses


def test_noise_does_not_thin_a_straight_frontier():
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e8, 1e10, 12)
    losses = 4 * (sizes / 1e8) ** -0.1 * np.exp(5e-4 * rng.standard_normal(12))
    pairs = zip(sizes, losses, strict=True)
    points = [point(run=f"{size:.3g}", parameters=size, tokens=20 * size, loss=loss) for size, loss in pairs]
    assert len(find_frontier(points)) >= 11
    worse = [dataclasses.replace(one, run=one.run + "b", loss=1.02 * one.loss) for one in points]
    assert find_frontier([*points, *worse]) == find_frontier(points)


def test_frontiers_that_tell_nothing():
    one_size = [point(run=str(i), tokens=1e9 * i, loss=4 - 0.1 * i) for i in range(1, 9)]
    with pytest.raises(NotSupported, match="several sizes; all 8 points lie at 1e"):
        frontier_laws(one_size)
    with pytest.raises(NotSupported, match="needs 3 points beside its open ends; it has 2"):
        frontier_laws([point(run=str(n), parameters=n, tokens=20 * n, loss=5 / n**0.03) for n in (1e8, 4e8)])
    ladder = [point(run=str(n), parameters=n, tokens=20 * n, loss=5 / n**0.03) for n in np.geomspace(1e8, 1e9, 6)]
    laws = frontier_laws(ladder)
    assert laws.parameters is None and laws.tokens is None and "what the sweep chose" in laws.why_not
    assert laws.loss.alpha.value == pytest.approx(-0.03 / 2, rel=1e-6)  # C grows as N^2
    with pytest.raises(NotSupported, match="there are no points"):
        frontier_laws([], [])


def test_isoflop_minima():
    computes = [1e18, 1e19, 1e20, 1e21]
    minima, refused = fit_groups(surface_points(lambda c: best_loss(c)[1] * np.geomspace(0.4, 2.5, 5), computes))
    assert not refused and [round(np.log10(minimum.flops)) for minimum in minima] == [18, 19, 20, 21]
    for minimum in minima:
        loss, size = best_loss(minimum.flops)
        assert minimum.loss == pytest.approx(loss, rel=2e-3)
        assert minimum.parameters == pytest.approx(size, rel=0.05)
        assert 6 * minimum.parameters * minimum.tokens == pytest.approx(minimum.flops, rel=1e-9)
    laws = isoflop_laws(minima)
    assert laws.parameters.alpha.value == pytest.approx(EXPONENT, abs=0.01)
    with pytest.raises(NotSupported, match="needs 3 points; it has 2"):
        isoflop_laws(minima[:2])


def parabola(sizes, low, tokens=None):
    losses = [3 + 0.05 * np.log(size / low) ** 2 for size in sizes]
    amounts = tokens or [1e18 / 6 / size for size in sizes]
    return [point(run=str(s), parameters=s, tokens=t, loss=y) for s, t, y in zip(sizes, amounts, losses, strict=True)]


def test_groups_without_a_minimum():
    assert fit_group("a", parabola([1e8, 2e8, 4e8], 1.7e8)).parameters == pytest.approx(1.7e8)
    for low, side in ((0.9e8, "smaller"), (5e8, "larger")):
        with pytest.raises(NotSupported, match=f"group a has no minimum between its sizes.*add {side} ones"):
            fit_group("a", parabola([1e8, 2e8, 4e8], low))
    with pytest.raises(NotSupported, match="do not curve upwards"):
        fit_group("a", [dataclasses.replace(p, loss=6 - p.loss) for p in parabola([1e8, 2e8, 4e8], 2e8)])
    with pytest.raises(NotSupported, match="needs 3 sizes; it has 2"):
        fit_group("a", parabola([1e8, 2e8], 1.5e8))
    with pytest.raises(NotSupported, match=r"differ 2\.00 times"):
        fit_group("a", parabola([1e8, 2e8, 4e8], 2e8, tokens=[1e9, 5e8, 5e8]))


def test_badly_tuned_runs_do_not_count():
    good = parabola([1e8, 2e8, 4e8], 2e8)
    bad = [dataclasses.replace(p, run=p.run + "bad", loss=p.loss + 1, learning_rate=1e-2) for p in good[1:]]
    seed = dataclasses.replace(good[0], run="seed", loss=good[0].loss + 0.01)
    assert best_settings([*good, *bad, seed]) == [*good, seed]
    assert fit_group("a", [*good, *bad]) == fit_group("a", good)
