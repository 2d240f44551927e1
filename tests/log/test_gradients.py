"""Differences of recorded gradients: scale, zeros, numbers and parameters that are missing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mmtrain.log.gradients import GradientRecord, gradient_differences


def record(**rows: list[float]) -> GradientRecord:
    return GradientRecord("float32", rows)


def test_the_difference_is_relative_to_the_parameter_s_own_gradient() -> None:
    first = record(big=[1e3, 900.0, -1100.0], small=[1.0, 1.0, -0.8])
    found = gradient_differences(first, record(big=[1e3, 900.0, -1100.0], small=[1.0, 1.003, -0.803]))
    assert found == {"big": 0.0, "small": pytest.approx(3e-3)}


def test_zeros_are_equal_and_rounding_of_zero_is_measured_by_the_whole() -> None:
    rest = [1.0, 1.0, 1.0]
    zero, noise, large = [0.0, 0.0, 0.0], [1e-10, 1e-10, -1e-10], [1e-3, 1e-3, -1e-3]
    assert gradient_differences(record(a=zero, b=rest), record(a=zero, b=rest))["a"] == 0.0
    assert gradient_differences(record(a=zero, b=rest), record(a=noise, b=rest))["a"] == pytest.approx(1e-5)
    assert gradient_differences(record(a=zero, b=rest), record(a=large, b=rest))["a"] > 1
    assert gradient_differences(record(a=large, b=rest), record(a=zero, b=rest))["a"] == pytest.approx(1.0)
    assert gradient_differences(record(a=zero), record(a=large))["a"] == math.inf  # all of the reference is zero


def test_what_is_missing_or_no_number_is_never_equal(tmp_path: Path) -> None:
    nan = math.nan
    first, second = record(a=[1.0, 1.0], b=[1.0, 1.0], c=[nan, nan]), record(b=[1.0, nan], c=[nan, nan], d=[1.0, 1.0])
    second.write(tmp_path)
    assert gradient_differences(first, GradientRecord.read(tmp_path)) == dict.fromkeys("abcd", math.inf)
    assert GradientRecord.read(tmp_path).parameters["d"] == [1.0, 1.0]
