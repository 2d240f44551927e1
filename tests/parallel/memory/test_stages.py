"""Stages balanced under the memory of a device, against all contiguous cuts there are."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.config.cli import compose
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.memory.options import most_with_margin
from mmtrain.parallel.memory.predict import GIB, predict
from mmtrain.parallel.memory.stages import PARAMETER_RATIO, balance_stages
from mmtrain.parallel.memory.workload import Workload, layer_parameters
from mmtrain.parallel.pipeline.split import layer_costs, split_layers

SMALL = ModelConfig("small", vocab_size=8000, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64,
                    ffn_hidden_size=1024, layer_pattern="LLLS", rotary_dim=32, num_experts=4)  # fmt: skip
LONG = 2**16


def work(model: ModelConfig = SMALL, pp: int = 3, seq_len: int = LONG, **parallel: object) -> Workload:
    options = ParallelConfig(pp=pp, **parallel)
    return Workload(model, options, plan_layout(pp, options, model, [seq_len]), seq_len, 2 * pp, 2)


def all_cuts(layers: int, stages: int) -> list[tuple[range, ...]]:
    bounds = ((0, *cuts, layers) for cuts in combinations(range(1, layers), stages - 1))
    return [tuple(range(start, end) for start, end in pairwise(one)) for one in bounds]


def slowest(model: ModelConfig, seq_len: int, cut: tuple[range, ...]) -> float:
    costs, head = layer_costs(model, seq_len)
    sums = [sum(costs[part.start : part.stop]) for part in cut]
    return max([*sums[:-1], sums[-1] + head])


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_no_cut_that_fits_has_a_cheaper_costliest_stage(pp: int, share: float) -> None:
    """Devices between the least that any cut needs and what the balance by cost alone needs."""
    at, model = work(pp=pp), SMALL
    peaks = {cut: predict(replace(at, stages=cut)).peak for cut in all_cuts(model.num_layers, pp)}
    by_cost = peaks[tuple(split_layers(model, pp, LONG))]
    limit = min(peaks.values()) + share * (by_cost - min(peaks.values()))
    device = limit * 1.03 + 3.0 * GIB  # margin_bytes, on more than one process
    assert most_with_margin(device, pp) == pytest.approx(limit)
    found = balance_stages([at], LONG, device)
    best = min(slowest(model, LONG, cut) for cut, peak in peaks.items() if peak <= limit * (1 + 1e-12))
    assert slowest(model, LONG, found) == pytest.approx(best)
    assert peaks[found] <= limit * (1 + 1e-12) and peaks[found] <= by_cost


def test_where_nothing_fits_the_ranks_need_as_little_as_they_can() -> None:
    peaks = [predict(replace(work(), stages=cut)).peak for cut in all_cuts(8, 3)]
    found = balance_stages([work()], LONG, 0.1 * GIB)
    assert predict(replace(work(), stages=found)).peak <= min(peaks) + GIB / 16
    assert balance_stages([work()], LONG, 0.1 * GIB, search=False) == tuple(split_layers(SMALL, 3, LONG))


def test_a_device_that_is_large_enough_leaves_the_balance_by_cost() -> None:
    assert balance_stages([work()], LONG, 200 * GIB) == tuple(split_layers(SMALL, 3, LONG))


def test_the_stages_fit_in_every_phase_that_is_trained_with_them() -> None:
    short, long = work(seq_len=2**12), work(seq_len=2**17)
    peaks = {cut: predict(replace(long, stages=cut)).peak for cut in all_cuts(8, 3)}
    limit = min(peaks.values()) * 1.01
    found = balance_stages([short, long], 2**12, limit * 1.03 + 3.0 * GIB)
    assert peaks[found] <= limit < peaks[tuple(split_layers(SMALL, 3, 2**12))]


@pytest.mark.parametrize("stages", [(4, 2), (2, 2)])
def test_a_rank_of_several_stages_fits_too(stages: tuple[int, int]) -> None:
    pp, chunks = stages
    at = work(replace(SMALL, num_layers=16), pp=pp, pp_schedule="interleaved", pp_chunks=chunks)
    cuts = all_cuts(16, pp * chunks) if pp * chunks < 6 else []
    even = tuple(range(i, i + 16 // (pp * chunks)) for i in range(0, 16, 16 // (pp * chunks)))
    limit = 1.05 * predict(replace(at, stages=even)).peak  # each stage is held to half of its rank's memory
    found = balance_stages([at], LONG, limit * 1.03 + 3.0 * GIB)
    assert len(found) == pp * chunks and found[-1].stop == 16
    assert predict(replace(at, stages=found)).peak <= limit * (1 + 1e-9)
    assert slowest(at.model, LONG, found) <= slowest(at.model, LONG, even)
    assert not cuts or found in cuts


@pytest.mark.parametrize("seq_len", [2**10, 2**14, 2**20])
@pytest.mark.parametrize("pp", [2, 3, 4, 5])
def test_without_a_device_s_memory_parameters_differ_by_a_bounded_ratio(pp: int, seq_len: int) -> None:
    at = work(pp=pp, seq_len=seq_len)
    of_kind = {letter: layer_parameters(SMALL, at.layout, letter).whole for letter in "LS"}

    def ratio(cut: tuple[range, ...]) -> float:
        sums = [sum(of_kind[SMALL.layer_types[layer]] for layer in part) for part in cut]
        return max(sums) / min(sums)

    cuts = all_cuts(8, pp)
    bound = PARAMETER_RATIO if any(ratio(cut) <= PARAMETER_RATIO for cut in cuts) else PARAMETER_RATIO**2
    best = min(slowest(SMALL, seq_len, cut) for cut in cuts if ratio(cut) <= bound)
    found = balance_stages([at], seq_len, None)
    assert ratio(found) <= bound and slowest(SMALL, seq_len, found) == pytest.approx(best)


def test_the_80_layers_at_a_million_tokens_are_no_longer_one_to_seven_a_stage() -> None:
    config = compose(["data.path=d", "run.name=r", "stage=long_ctx", "model=minimax_text_01", "parallel.pp=16",
                      "parallel.cp=16", "parallel.tp=8", "parallel.ep=32", "parallel.activation_checkpoint=block"],
                     Path(__file__).parents[3] / "configs")  # fmt: skip
    at = Workload(
        config.model, config.parallel, plan_layout(2048, config.parallel, config.model, [2**20]), 2**20, 16, 2
    )
    sizes = [len(part) for part in split_layers(config.model, 16, 2**20)]
    assert (min(sizes), max(sizes)) == (2, 6)
    bounded = [len(part) for part in balance_stages([at], 2**20, None)]
    assert (min(bounded), max(bounded), sum(bounded)) == (4, 6, 80)
