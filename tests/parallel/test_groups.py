"""How a rank's experts are cut into groups, and which number of groups is kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmtrain.parallel.groups import cut
from mmtrain.parallel.lanes import Lanes, Meter
from mmtrain.parallel.tune import Choice, choose


@pytest.mark.parametrize("held", range(1, 33))
def test_groups_are_whole_consecutive_and_end_small(held: int) -> None:
    for groups in range(1, held + 1):
        parts = cut(held, groups)
        assert len(parts) == groups and parts[0].start == 0 and parts[-1].stop == held
        sizes = [part.stop - part.start for part in parts]
        assert all(before.stop == after.start for before, after in itertools.pairwise(parts))
        assert min(sizes) >= 1 and (groups < 3 or max(sizes[0], sizes[-1]) <= max(sizes[1:-1]))


def test_what_is_exposed_is_the_smallest_part() -> None:
    assert [part.stop - part.start for part in cut(8, 4)] == [1, 3, 3, 1]
    assert [part.stop - part.start for part in cut(8, 2)] == [4, 4]


@pytest.mark.parametrize(
    ("seconds", "groups"),
    [({1: 1.0, 2: 0.995, 4: 0.999}, 1), ({1: 1.0, 2: 0.9, 4: 0.895}, 2), ({1: 1.0, 2: 0.9, 4: 0.8, 8: 0.85}, 4),
     ({1: 1.0}, 1), ({1: 1.0, 2: 1.3}, 1)],
)  # fmt: skip
def test_more_groups_have_to_pay(seconds: dict[int, float], groups: int) -> None:
    assert choose(seconds) == groups
    assert f"took {groups} " in str(Choice(groups, seconds))


def test_on_a_cpu_nothing_is_hidden() -> None:
    lanes, done = Lanes(torch.device("cpu")), []
    lanes.run("ep", lambda: done.append("unmeasured"))
    lanes.meter = Meter()
    lanes.wait(lanes.run("ep", lambda: done.append("measured")))
    taken, waited = lanes.read()
    assert done == ["unmeasured", "measured"] and taken == waited > 0
    assert lanes.meter is None and lanes.read() == (0.0, 0.0)
