"""A sweep's folder is fitted as a whole: what is written, told, refused and doubted."""

import dataclasses
import json

import numpy as np
import pytest

from mmtrain.errors import ConfigError
from mmtrain.scaling import FitOptions, fit_sweep, write_points
from mmtrain.scaling.__main__ import main
from mmtrain.scaling.fit import fit_points
from mmtrain.scaling.tables import Table, as_markdown, as_text
from tests.scaling.made import REFIT, curve_points, paper_points, point, refit_loss, surface_points
from tests.scaling.test_batch_and_rates import batch_points, rate_points

SIZES, COMPUTES = [5e7, 1e8, 2e8, 4e8, 8e8, 1.6e9], [1e18, 3e18, 1e19, 3e19, 1e20]
QUICK = FitOptions(resamples=40)


def one(points, **options):
    (fit,) = fit_points(points, dataclasses.replace(QUICK, **options))
    return fit


def test_files_and_summary(tmp_path):
    groups = surface_points(SIZES, COMPUTES, 0.002, experts=16)
    write_points(tmp_path, [*paper_points("softmax", 1e-3), *groups])
    found = fit_sweep(tmp_path, dataclasses.replace(QUICK, target_flops=1e21))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fit.json", "fit.md", "fit.png", "points.jsonl"]
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "fit.json").read_text())
    assert set(record["fits"]) == {"softmax", "hybrid, 16 experts"}
    mixture = record["fits"]["hybrid, 16 experts"]
    assert mixture["points"] == 30 and mixture["surface"]["form"] == "L(N, D) = E + A/N^alpha + B/D^beta"
    low, high = (mixture["surface"]["coefficients"]["alpha"][end] for end in ("low", "high"))
    assert low < REFIT["alpha"] < high
    assert record["paper_table_2"]["softmax"]["loss"] == {"beta": 3.7087, "alpha": -0.0798}
    page = (tmp_path / "fit.md").read_text()
    assert (
        page.startswith(f"# Scaling laws of {tmp_path.name}\n") and "| MiniMax-01 Table 2 | 3.709 C^-0.0798 |" in page
    )
    assert found.summary == (
        "fitted softmax: frontier, isoFLOP, L(N, D); hybrid, 16 experts: frontier, isoFLOP, L(N, D), L(P, T) -> "
        f"{tmp_path}: fit.json, fit.md, fit.png"
    )
    assert "hybrid, 16 experts\n---" in found.text and "Predicted at 1e+21 FLOP (11.6 PFLOP/s-days)" in found.text


def test_held_out_size_and_prediction():
    fit = one(surface_points(SIZES, COMPUTES, noise=0.001), target_flops=1e22)
    by_size, by_group = fit.held_out
    assert by_size.parameters == 1.6e9 and abs(by_size.error) < 0.01
    assert by_size.measured == max((p for p in fit.ends if p.activated == 1.6e9), key=lambda p: p.flops).loss
    assert by_group.method == "L(C) of isoFLOP minima" and by_group.flops == pytest.approx(1e20)
    assert by_group.error < 0  # a straight line goes below a law with a floor
    by = {prediction.method: prediction for prediction in fit.predictions}
    exact = [(refit_loss(n, 1e22 / 6 / n), n) for n in np.geomspace(1e9, 1e11, 2000)]
    loss, size = min(exact)
    found = by["L(N, D)"]
    assert found.loss.low < loss < found.loss.high and found.loss.value == pytest.approx(loss, rel=0.01)
    assert found.parameters.value == pytest.approx(size, rel=0.2) and found.beyond == pytest.approx(100)
    assert 6 * found.parameters.value * found.tokens.value == pytest.approx(1e22, rel=1e-6)
    assert any("bends upwards" in doubt for doubt in fit.doubts)


def test_validations_on_the_way_count_where_told():
    points = curve_points([7e7, 1.6e8, 4.1e8, 1e9, 3e9], 3e11)
    fit = one(points)
    assert fit.surface is None and fit.frontier_laws is not None
    assert any("115 validations on the way" in reason and "intermediate=all" in reason for reason in fit.refused)
    used = one(points, intermediate="all")
    assert used.surface.coefficients["alpha"].value == pytest.approx(REFIT["alpha"], rel=1e-3)
    assert {held.method for held in used.held_out} == {"L(N, D)", "L(C)"} and abs(used.held_out[0].error) < 1e-3
    assert len(fit.frontier) > 10 and all(p.final for p in one(points, intermediate="none").frontier)


def test_one_size_supports_no_law_of_size_but_batches_and_rates():
    fit = one([*batch_points(), *rate_points([1e8], np.geomspace(1e-4, 1e-2, 5))])
    assert fit.frontier_laws is None and fit.surface is None
    assert any("all 205 points lie at 1e+08 parameters" in reason for reason in fit.refused)
    assert any("at 1 and 1" in reason for reason in fit.refused)
    assert fit.batch_law.alpha.value == pytest.approx(-5.8, abs=0.1) and len(fit.rates) == 1
    assert any("lr(N) needs 3 points; it has 1" in reason for reason in fit.refused)
    assert not fit.ramp  # there is no L(N, D) to tell when


def test_ramp_of_the_target():
    points = [*surface_points(SIZES, COMPUTES), *batch_points()]
    fit = one(points, target_flops=1e21)
    size, tokens = fit.ramp_for
    assert 6 * size * tokens == pytest.approx(1e21, rel=1e-3) and len(fit.ramp) > 1
    assert one(points).ramp_for == (1.6e9, pytest.approx(1e20 / 6 / 1.6e9))


def test_wide_intervals_are_told():
    points = surface_points(SIZES, [1e18, 2e18, 4e18], noise=0.1)
    fit = one(points, target_flops=1e24)
    assert any(doubt.startswith("the data do not support") and "alpha of L(N, D)" in doubt for doubt in fit.doubts)
    assert any("do not support a prediction by L(N, D) at 1e+24 FLOP" in doubt for doubt in fit.doubts)
    clean = one(surface_points(lambda c: np.sqrt(c / 120) * np.geomspace(0.3, 3, 5), COMPUTES, noise=5e-4))
    assert not any("L(N, D)" in doubt and "support" in doubt for doubt in clean.doubts)


def test_any_few_points_are_answered_not_crashed(tmp_path):
    two = [point(), point(run="b", tokens=2e9)]
    for points in ([point()], two, [point(final=False)], paper_points("hybrid", days=(1.0,))):
        write_points(tmp_path, points)
        found = fit_sweep(tmp_path, dataclasses.replace(QUICK, target_flops=1e20))
        assert "Not fitted:" in found.text and "needs" in found.text


def test_command(tmp_path, capsys):
    write_points(tmp_path, surface_points(SIZES, COMPUTES, 0.002))
    assert main([str(tmp_path), "--target-flops", "1e21", "--resamples", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("fitted hybrid: frontier, isoFLOP, L(N, D) -> ")
    assert main([str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err
    for wrong in (["--target-flops", "-1"], ["--resamples", "10"], ["--target-flops", "nan"]):
        assert main([str(tmp_path), *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ConfigError, match="give none, frontier or all"):
        FitOptions(intermediate="some")


def test_tables_are_written_both_ways():
    blocks = ["text", Table(["a", "b"], [["1", "x|y"], ["1000", ""]])]
    assert as_text(blocks) == "text\n\na     b\n1     x|y\n1000\n"
    assert as_markdown("T", blocks) == "# T\n\ntext\n\n| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 1000 |  |\n"
