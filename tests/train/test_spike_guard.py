"""Guard against spikes: its limits, what it counts, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from mmtrain.config import GuardConfig
from mmtrain.train.spike_guard import NO_LIMITS, SpikeGuard
from tests.train.test_report import RESULT

OPTIONS = GuardConfig(spike_deviations=3.0, spike_window=6, max_in_row=2)
LOSSES = [5.0, 4.0, 4.5, 3.9, 3.7, 3.8, 3.5, 3.6]
NORMS = [1.0, 0.9, 0.7, 0.8, 0.75, 0.72, 0.7, 0.71]
SKIPPED = replace(RESULT, loss=math.nan, grad_norm=math.inf, skipped=True)


def fed(count: int, options: GuardConfig = OPTIONS) -> SpikeGuard:
    guard = SpikeGuard(options)
    guard.limits(0)
    for step in range(count):
        guard.take(step + 1, replace(RESULT, loss=LOSSES[step], grad_norm=NORMS[step]))
    return guard


@pytest.mark.parametrize("count", range(9))
def test_limits_are_of_the_last_steps_of_the_window_once_it_is_half_full(count: int) -> None:
    limits = fed(count).limits(0)
    if count < 3:
        assert limits == NO_LIMITS
        return
    for found, values in zip(limits, (LOSSES, NORMS), strict=True):
        last = np.array(values[max(0, count - 6) : count])
        assert found == pytest.approx(last.mean() + 3 * np.sqrt(((last - last.mean()) ** 2).mean()), rel=1e-14)


def test_steps_that_were_skipped_are_counted_and_are_no_measure() -> None:
    guard = fed(5)
    before = guard.limits(0)
    guard.take(6, SKIPPED)
    assert (guard.in_row, guard.first_skipped, guard.wants_rollback) == (1, 6, False) and guard.limits(0) == before
    guard.take(7, SKIPPED)
    assert (guard.in_row, guard.first_skipped, guard.wants_rollback) == (2, 6, True) and guard.limits(0) == before
    guard.take(8, RESULT)
    assert (guard.in_row, guard.wants_rollback) == (0, False)
    guard.take(9, SKIPPED)
    assert guard.first_skipped == 9


def test_a_new_phase_begins_without_limits() -> None:
    guard = fed(8)
    assert guard.limits(1) == NO_LIMITS
    assert guard.limits(0) == NO_LIMITS  # nor does an old one come back


def test_a_guard_that_is_off_limits_nothing_and_asks_for_nothing() -> None:
    guard = fed(8, GuardConfig(max_in_row=1))
    guard.take(9, SKIPPED)
    assert guard.limits(0) == NO_LIMITS and not guard.wants_rollback and not guard.is_on


def test_a_checkpoint_keeps_all_of_it() -> None:
    guard = fed(7)
    guard.take(8, SKIPPED)
    again = SpikeGuard(OPTIONS)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.limits(0) == guard.limits(0) and again.state() == guard.state()
    assert fed(0).limits(0) != guard.limits(0)
    again.restore(None)
    assert again.state() == SpikeGuard(OPTIONS).state() and again.limits(0) == NO_LIMITS
