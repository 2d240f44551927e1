"""Ranks that are slower than the others, by what each of them measured."""

from __future__ import annotations

import pytest
import torch

from mmtrain.health.product_time import product_seconds
from mmtrain.health.stragglers import Pace, pace_record, slow_ranks

EVEN = [Pace(0.01, 0.001, 1.0)] * 4


def changed(rank: int, **values: float) -> list[Pace]:
    return [pace._replace(**values) if number == rank else pace for number, pace in enumerate(EVEN)]


def test_nobody_is_slow_where_all_are_alike() -> None:
    assert slow_ranks(EVEN) == {}
    assert slow_ranks([pace._replace(product=9.0, reading=0.5) for pace in EVEN]) == {}


@pytest.mark.parametrize("rank", range(4))
def test_a_slow_device_is_named_with_its_time(rank: int) -> None:
    assert slow_ranks(changed(rank, product=0.0119)) == {}
    found = slow_ranks(changed(rank, product=0.0142))
    assert found == {(rank, "device"): "a product takes its device 14.2 ms, the others' 10.0 (median)"}


def test_slow_rows_are_named_from_a_share_of_the_step_on() -> None:
    assert slow_ranks(changed(2, reading=0.05)) == {}
    found = slow_ranks(changed(2, reading=0.25))
    text = "it waits 0.25 s a step for its rows, the others 0.00 (median), in steps of 1.00 s"
    assert found == {(2, "rows"): text}
    assert slow_ranks([pace._replace(step=10.0) for pace in changed(2, reading=0.25)]) == {}
    assert slow_ranks([pace._replace(step=0.01) for pace in changed(2, reading=0.02)]) == {}


def test_of_two_ranks_the_slower_is_named() -> None:
    assert list(slow_ranks([Pace(0.01, 0.0, 1.0), Pace(0.02, 0.0, 1.0)])) == [(1, "device")]


def test_a_product_takes_some_time() -> None:
    assert 0 < product_seconds(torch.device("cpu"), torch.float32, 64) < 10


def test_a_record_of_paces_is_as_short_for_many_ranks() -> None:
    paces = [Pace(0.001, 0.0, 1.0)] * 511 + [Pace(0.0033333333, 0.2, 1.0)]
    assert pace_record(paces) == {"pace_product_s": [0.001, 0.001, 0.003333, 511], "pace_rows_s": [0.0, 0.0, 0.2, 511]}
