"""How a rank's experts are cut into groups, and which number of groups is kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmkernels.moe import route
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.expert.autotune import Choice, choose
from mmtrain.parallel.expert.comm_streams import Lanes, Meter
from mmtrain.parallel.expert.token_groups import cut, in_parts
from mmtrain.parallel.layout import plan_layout

MODEL = ModelConfig("m", vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
                    ffn_hidden_size=16, num_experts=8, rotary_dim=8)  # fmt: skip


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


@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("parts", [2, 3, 9])
def test_parts_of_an_expert_are_consecutive_rows_of_it(capacity: int | None, parts: int) -> None:
    plan = route(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), 2, capacity)
    cut_up = in_parts(plan, parts)
    assert cut_up.capacity == (None if capacity is None else -(-capacity // parts))
    assert torch.equal(cut_up.count_E.view(5, parts).sum(1), plan.count_E) and torch.equal(cut_up.slot_TK, plan.slot_TK)
    assert capacity is None or int(cut_up.count_E.max()) <= cut_up.capacity
    begin_E = cut_up.offset_E - cut_up.count_E
    for token, k in (plan.slot_TK >= 0).nonzero().tolist():
        expert, row = int(cut_up.expert_TK[token, k]), int(plan.slot_TK[token, k])
        assert expert // parts == plan.expert_TK[token, k] and begin_E[expert] <= row < cut_up.offset_E[expert]
    assert in_parts(plan, 1) is plan


@pytest.mark.parametrize(("groups", "fits"), [(3, True), (4, True), (8, True), (12, True), (5, False), (6, False)])
def test_groups_that_fit_a_rank_with_four_experts(groups: int, fits: bool) -> None:
    parallel, model = ParallelConfig(ep=2, token_groups=groups), MODEL
    if fits:
        plan_layout(2, parallel, model)
        return
    with pytest.raises(ConfigError) as caught:
        plan_layout(2, parallel, model)
    assert caught.value.option == "parallel.token_groups" and "8 / ep 2" in caught.value.problem
