"""How a rank's experts are split into token groups, and which number of groups is kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmkernels.moe import route
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.expert.autotune import TokenGroupsChoice, fewest_that_pay
from mmtrain.parallel.expert.comm_streams import CommStreams, CommTimes
from mmtrain.parallel.expert.token_groups import exact_groups, split_experts, split_into_chunks
from mmtrain.parallel.layout import plan_layout

MODEL = ModelConfig("m", vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
                    ffn_hidden_size=16, num_experts=8, rotary_dim=8)  # fmt: skip


@pytest.mark.parametrize("local_experts", range(1, 33))
def test_groups_are_whole_consecutive_and_end_small(local_experts: int) -> None:
    for groups in range(1, local_experts + 1):
        parts = split_experts(local_experts, groups)
        assert len(parts) == groups and parts[0].start == 0 and parts[-1].stop == local_experts
        sizes = [part.stop - part.start for part in parts]
        assert all(before.stop == after.start for before, after in itertools.pairwise(parts))
        assert min(sizes) >= 1 and (groups < 3 or max(sizes[0], sizes[-1]) <= max(sizes[1:-1]))


def test_what_is_exposed_is_the_smallest_part() -> None:
    assert [part.stop - part.start for part in split_experts(8, 4)] == [1, 3, 3, 1]
    assert [part.stop - part.start for part in split_experts(8, 2)] == [4, 4]


@pytest.mark.parametrize(
    ("seconds", "groups"),
    [({1: 1.0, 2: 0.995, 4: 0.999}, 1), ({1: 1.0, 2: 0.9, 4: 0.895}, 2), ({1: 1.0, 2: 0.9, 4: 0.8, 8: 0.85}, 4),
     ({1: 1.0}, 1), ({1: 1.0, 2: 1.3}, 1)],
)  # fmt: skip
def test_more_groups_have_to_pay(seconds: dict[int, float], groups: int) -> None:
    assert fewest_that_pay(seconds) == groups
    assert f"took {groups} " in str(TokenGroupsChoice(groups, seconds))


def test_on_a_cpu_nothing_is_hidden() -> None:
    streams, done = CommStreams(torch.device("cpu")), []
    streams.run("ep", lambda: done.append("untimed"))
    streams.start_timing()
    streams.wait(streams.run("ep", lambda: done.append("timed")))
    times = streams.read_times()
    assert done == ["untimed", "timed"] and times.seconds == times.waited_seconds > 0
    streams.run("ep", lambda: done.append("untimed"))
    assert streams.read_times() == CommTimes(0.0, 0.0)


@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("chunks", [2, 3, 9])
def test_chunks_of_an_expert_are_consecutive_rows_of_it(capacity: int | None, chunks: int) -> None:
    plan = route(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), 2, capacity)
    split = split_into_chunks(plan, chunks)
    assert split.capacity == (None if capacity is None else -(-capacity // chunks))
    assert torch.equal(split.count_E.view(5, chunks).sum(1), plan.count_E) and torch.equal(split.row_TK, plan.row_TK)
    assert capacity is None or int(split.count_E.max()) <= split.capacity
    begin_E = split.offset_E - split.count_E
    for token, k in (plan.row_TK >= 0).nonzero().tolist():
        expert, row = int(split.expert_TK[token, k]), int(plan.row_TK[token, k])
        assert expert // chunks == plan.expert_TK[token, k] and begin_E[expert] <= row < split.offset_E[expert]
    assert split_into_chunks(plan, 1) is plan


@pytest.mark.parametrize(("groups", "fits"), [(3, True), (4, True), (8, True), (12, True), (5, False), (6, False)])
def test_groups_that_fit_a_rank_with_four_experts(groups: int, fits: bool) -> None:
    parallel, model = ParallelConfig(ep=2, token_groups=groups), MODEL
    if fits:
        plan_layout(2, parallel, model)
        return
    with pytest.raises(ConfigError) as caught:
        plan_layout(2, parallel, model)
    assert caught.value.option == "parallel.token_groups" and "8 / ep 2" in caught.value.problem


SHAPES = [(1, 1, 1, 1), (3, 1, 4, 2), (2, 2, 3, 1), (4, 3, 5, 3)]


@pytest.mark.parametrize(("ranks", "slices", "experts", "groups"), SHAPES)
def test_rows_of_exact_size_are_sorted_by_expert_in_the_order_in_which_they_came(
    ranks: int, slices: int, experts: int, groups: int
) -> None:
    draw = torch.Generator().manual_seed(ranks)
    count_WPWL = torch.randint(0, 6, (ranks, slices, ranks, experts), generator=draw)
    count_WPWL *= torch.rand(count_WPWL.shape, generator=draw) < 0.7  # some send nothing
    if ranks == 1:
        count_WPWL[:] = 0
    splits = split_experts(experts, groups)
    for rank, slice_ in itertools.product(range(ranks), range(slices)):
        parts, received = exact_groups(count_WPWL.int(), count_WPWL, splits, rank, slice_)
        for split, part, order in zip(splits, parts, received, strict=True):
            counts = count_WPWL[:, :, rank, split].tolist()
            blocks = [[(e, w) for w in range(ranks) for e, n in enumerate(counts[w][p]) for _ in range(n)]
                      for p in range(slices)]  # fmt: skip
            assert part.padded == max(map(len, blocks)) and part.received == len(blocks[slice_])
            assert part.send_counts == count_WPWL[rank, slice_, :, split].sum(1).tolist()
            arrived = [(e, p * part.padded + i) for p, block in enumerate(blocks) for i, (e, _) in enumerate(block)]
            source = [at for _, at in sorted(arrived)]
            assert order.source_M.tolist() == source + [-1] * (slices * part.padded - len(source))
            assert all(order.target_M[at] == row for row, at in enumerate(source))
            assert (order.target_M >= 0).sum() == len(source)
            assert {numbers.dtype for numbers in order} == {torch.int32}
            last = range(split.stop - split.start)
            assert order.offset_L.tolist() == [sum(e <= expert for e, _ in arrived) for expert in last]
