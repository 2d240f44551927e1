"""Power laws through a few points, with Student's intervals."""

import numpy as np
import pytest

from mmtrain.scaling.power import NotSupported, fit_power, student

# Student's 97.5% quantiles from a printed table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 20: 2.086, 60: 2.000}


def test_quantiles():
    for freedom, printed in TABLE.items():
        assert student(freedom) == pytest.approx(printed, rel=2e-3)


def test_a_law_is_recovered_and_solved():
    x = np.geomspace(0.01, 100, 9)
    law = fit_power(x, 3.5 * x**-0.076, "L(C)")
    assert (law.beta.value, law.alpha.value) == pytest.approx((3.5, -0.076))
    assert law.at(1e4).value == pytest.approx(3.5 * 1e4**-0.076)
    assert law.solve(law.at(7.0).value) == pytest.approx(7.0)
    assert law.scatter < 1e-12 and law.alpha.high - law.alpha.low < 1e-10
    assert abs(law.bend.value) < 1e-12


def test_intervals_grow_away_from_the_points_and_with_shared_runs():
    rng, x = np.random.default_rng(0), np.geomspace(1, 100, 12)
    y = 2 * x**0.5 * np.exp(0.05 * rng.standard_normal(12))
    law, shared = fit_power(x, y, "y"), fit_power(x, y, "y", independent=4)
    widths = [law.at(at).relative_half_width for at in (10, 1e3, 1e6)]
    assert widths == sorted(widths) and widths[2] > 3 * widths[0]
    # 10 and 2 degrees of freedom: the quantile, and an error as of four points with their own divisor
    ratio = (student(2) * np.sqrt(1 / 2)) / (student(10) * np.sqrt(1 / 10))
    assert np.log(shared.at(10).high / shared.at(10).value) == pytest.approx(
        ratio * np.log(law.at(10).high / law.at(10).value)
    )


def test_a_floor_shows_as_a_bend():
    x = np.geomspace(0.1, 100, 8)
    law = fit_power(x, 1.7 + 2 * x**-0.15, "L(C)")
    assert law.bend.low > 1e-3
    assert fit_power(x[:3], x[:3], "y").bend is None


def test_too_little_is_refused():
    with pytest.raises(NotSupported, match=r"L\(C\) needs 3 points; it has 2"):
        fit_power([1, 2], [1, 2], "L(C)")
    with pytest.raises(NotSupported, match="needs points of 3 runs; its 5 are of 2"):
        fit_power([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "L(C)", independent=2)
    with pytest.raises(NotSupported, match="all 3 lie at 2"):
        fit_power([2, 2, 2], [1, 2, 3], "L(C)")
