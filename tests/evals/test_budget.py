"""Evaluations within their time: which grid how often, and what a phase says of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.checkpoint.progress import Progress
from mmtrain.config import EvalsConfig, NeedlesConfig, PhaseConfig
from mmtrain.config.schema import Count
from mmtrain.evals import needles as module
from mmtrain.evals.budget import Costs, Plan, allowance, fit
from mmtrain.evals.cell_score import CellScore
from mmtrain.evals.grid import Grid
from mmtrain.evals.needles import NeedleEvaluation

GRID = Grid(("single", "multi"), (64, 128), (0.0, 0.25, 0.5, 0.75, 1.0), 4)


def cost(grid: Grid) -> float:
    """A second a sample of each length."""
    return float(len(grid.lengths) * grid.samples_of_length)


def test_a_grid_grows_thinner_to_one_sample() -> None:
    thinner = list(GRID.thinner())
    costs = [cost(GRID), *map(cost, thinner)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    assert thinner[-1] == Grid(("single",), (64,), (0.5,), 1)
    assert [grid.depths for grid in thinner[2:4]] == [(0.0, 0.5, 1.0), (0.5,)]


@pytest.mark.parametrize(
    ("seconds", "every", "plan"),
    [
        (800.0, 10, Plan(GRID, 10)),  # ten of 80 s
        (799.0, 10, Plan(GRID, 12)),  # nine
        (160.0, 10, Plan(GRID, 50)),
        (80.0, 10, Plan(GRID, 100)),  # the one at the end
        (80.0, 0, Plan(GRID, 0)),
        (79.0, 10, Plan(next(GRID.thinner()), 0)),
        (1.0, 0, Plan(list(GRID.thinner())[-1], 0)),
        (0.9, 0, Plan(None, 0)),
        (-5.0, 10, Plan(None, 0)),
    ],
)
def test_evaluations_are_set_apart_first_then_made_smaller_then_left_out(
    seconds: float, every: int, plan: Plan
) -> None:
    assert fit(GRID, cost, seconds, 100, every) == plan


def test_what_is_spent_is_a_share_of_all_the_time() -> None:
    allowed = allowance(0.2, 1.0, 100, 0.0)
    assert allowed / (100 + allowed) == pytest.approx(0.2) and allowance(0.2, 1.0, 100, 10.0) == allowed - 10.0


def test_costs_are_of_rounds_in_which_each_rank_has_a_sample() -> None:
    costs = Costs(ranks=3)
    costs.measured(GRID, {64: 14.0, 128: 28.0}, 45.0)  # 40 samples in 14 rounds
    assert costs.round_s == {64: 1.0, 128: 2.0} and costs.of(GRID) == 45.0
    assert costs.of(Grid(("single",), (128,), (0.5,), 4)) == 3.0 + 2 * 2.0


class Clock:
    """A clock that stands still but for the samples that are scored, a second a round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, second: float = 1.0) -> None:
        self.now, self.second, self.runs = 0.0, second, []
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(module, "score_cells", self.score)

    def score(self, model: Any, builder: Any, cells: list, samples: int, rope_base: float) -> list[CellScore]:
        self.now += self.second * len(cells) * samples
        self.runs.append((cells[0].length, len(cells) * samples, rope_base))
        return [CellScore(cell, 0.0, 0.0, 1.0) for cell in cells]


def phase(name: str, seq_len: int, rope_base: float) -> PhaseConfig:
    return PhaseConfig(name, Count(seq_len), rope_base, Count(1), [], [])


class Run:
    """Steps of a second each in phases of 40 steps, with a report that keeps what it is told."""

    def __init__(self, options: EvalsConfig, grids: list[Grid | None]) -> None:
        builder = SimpleNamespace(haystack=SimpleNamespace(laps=lambda count: count / 100))
        self.needles_of, self.grids = NeedleEvaluation(options, grids, builder), grids
        self.model = SimpleNamespace(context=SimpleNamespace(dp_size=1, device=torch.device("cpu")))
        self.at: list[int] = []
        self.results: list[Any] = []
        self.notes: list[str] = []

    def needles(self, progress: Progress, result: Any) -> None:
        self.at.append(progress.step)
        self.results.append(result)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def go(self) -> None:
        for i in range(len(self.grids)):
            for step in range(1, 41):
                progress = Progress(40 * i + step, 0, i, 0, 0)
                of_phase = phase(f"p{i}", 128, 1e4 * (i + 1))
                self.needles_of.after_step(self.model, of_phase, progress, 40 - step, 1.0, self)


SMALL = Grid(("single",), (64, 128), (0.5,), 2)  # 4 s


def test_evaluations_are_due_every_few_steps_and_at_ends_of_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, second=1e-3)
    run = Run(EvalsConfig(0.02, NeedlesConfig(every=15)), [SMALL, None, SMALL])
    run.go()
    assert run.at == [15, 30, 40, 95, 110, 120] and run.notes == []
    for base, runs in ((1e4, clock.runs[:8]), (3e4, clock.runs[8:])):  # measured once in each phase
        assert runs == [(64, 1, base), (128, 1, base), *[(64, 2, base), (128, 2, base)] * 3]
    assert run.results[0].repeats == {128: 1.28} and run.results[0].phase == "p0"
    assert Run(EvalsConfig(0.02, NeedlesConfig()), [SMALL]).go() is None
    ends = Run(EvalsConfig(0.5, NeedlesConfig()), [SMALL, SMALL])
    ends.go()
    assert ends.at == [40, 80]


def test_evaluations_that_take_too_long_are_set_further_apart_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    run = Run(EvalsConfig(0.25, NeedlesConfig(every=5)), [SMALL])  # 13.3 s beside 40 of steps: 2 to measure, 2 of 4 s
    run.go()
    assert run.at == [20, 40] and clock.now / (40 + clock.now) < 0.25
    assert run.notes == ["needles: single at 64 to 128 tokens, 1 depth x 2 samples takes 4.0 s, a step 1.00 s; to keep "
                         "evals.max_share=0.25 of phase p0: all of it, every 20 steps"]  # fmt: skip


def test_a_grid_too_large_for_its_phase_is_made_smaller_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    run = Run(EvalsConfig(0.1, NeedlesConfig(every=5)), [SMALL])  # 4.4 s: 2 to measure, one of 2 s
    run.go()
    assert run.at == [40] and run.results[0].samples == 1 and clock.now / (40 + clock.now) < 0.1
    assert len(run.notes) == 1 and run.notes[0].endswith("1 depth x 1 sample, at its end only")
    none = Run(EvalsConfig(0.01, NeedlesConfig(every=5)), [SMALL])
    none.go()
    assert none.at == [] and "none in the rest of it" in none.notes[0] and len(none.notes) == 1
