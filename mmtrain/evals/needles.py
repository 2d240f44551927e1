"""Needles in the loop of training: when they are due, within their share of the time, and what comes of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Protocol

from mmdata.corpus.split import Split
from mmdata.tokenizer import Tokenizer
from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.progress import Progress
from mmtrain.config import EvalsConfig, PhaseConfig, PretrainConfig
from mmtrain.evals.budget import Costs, Plan, allowance, fit
from mmtrain.evals.cell_score import CellScore
from mmtrain.evals.grid import Grid, check_grids
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.result import NeedleResult
from mmtrain.evals.sample import SampleBuilder
from mmtrain.evals.score import Scorer, score_cells


class NeedleReport(Protocol):
    """Taker of results and lines; on other ranks than the main one it does nothing."""

    def needles(self, progress: Progress, result: NeedleResult) -> None:
        """Record a result."""

    def note(self, text: str) -> None:
        """Print a line that stays."""


class NeedleEvaluation:
    """Evaluation of needles at the ends of phases and every few steps.

    All ranks decide alike: by the numbers of steps, and by the main process's clock.

    Args:
        options: checked.
        grids: of each phase; None where its rows hold none.
        builder: of samples.
    """

    def __init__(self, options: EvalsConfig, grids: Sequence[Grid | None], builder: SampleBuilder) -> None:
        self._options, self._grids, self._builder = options, grids, builder
        self._phase = -1

    def header_lines(self, phases: Sequence[PhaseConfig]) -> list[str]:
        """Return a line about each phase: what is evaluated in it, and the lengths that its rows do not hold."""
        every, lines = self._options.needles.every, []
        when = f"every {every:,} steps and at its end" if every else "at its end"
        for phase, grid in zip(phases, self._grids, strict=True):
            left_out = [f"{length:,}" for length in self._options.needles.lengths if length > phase.seq_len]
            beyond = f"; its rows of {phase.seq_len:,} tokens do not hold {', '.join(left_out)}" if left_out else ""
            lines.append(f"needles in phase {phase.name}: {f'{grid}, {when}' if grid else 'none'}{beyond}")
        return lines

    def after_step(
        self, model: Scorer, phase: PhaseConfig, progress: Progress, left: int, seconds: float, report: NeedleReport
    ) -> None:
        """Evaluate if it is due after a step. Collective; every rank calls it after every step.

        Args:
            model: under its layout.
            phase: that the step belongs to.
            progress: after the step.
            left: steps of the phase, or of the launch in it, that are still to come, an estimate; 0 is exact.
            seconds: that the step took on this rank.
            report: gets the result, and a line when evaluations are set further apart or made smaller.
        """
        if progress.phase != self._phase:
            self._begin_phase(progress)
        self._seconds.append(seconds)
        if self._wanted is None or not self._is_due(progress.step, left):
            return
        if not self._planned:
            self._measure(self._wanted, model, phase)  # anew in each phase, whose layout may be another
            self._plan_rest(phase, progress.step, left, report)
        if self._plan.grid is None or not self._is_due(progress.step, left):
            return
        self._evaluate(self._plan.grid, model, phase, progress, report)
        if left:
            self._plan_rest(phase, progress.step, left, report)

    def _begin_phase(self, progress: Progress) -> None:
        self._phase, self._begin = progress.phase, progress.step - 1
        self._last, self._spent, self._planned = self._begin, 0.0, False
        self._seconds: list[float] = []
        self._costs = Costs(ranks=1)
        self._wanted = self._grids[progress.phase]
        self._plan = Plan(self._wanted, self._options.needles.every)

    def _is_due(self, step: int, left: int) -> bool:
        return left == 0 or (self._plan.every > 0 and step - self._last >= self._plan.every)

    def _measure(self, grid: Grid, model: Scorer, phase: PhaseConfig) -> None:
        """Time one sample a rank of each length."""
        began = time.perf_counter()
        self._costs.ranks = model.context.dp_size
        round_s: dict[int, float] = {}
        for length in grid.lengths:
            start = time.perf_counter()
            score_cells(model, self._builder, grid.cells(length)[:1], self._costs.ranks, phase.rope_base)
            round_s[length] = time.perf_counter() - start
        round_s, took = on_main(lambda: (round_s, time.perf_counter() - began))
        self._costs.round_s |= round_s
        self._spent += took

    def _evaluate(
        self, grid: Grid, model: Scorer, phase: PhaseConfig, progress: Progress, report: NeedleReport
    ) -> None:
        began = time.perf_counter()
        by_length: dict[int, float] = {}
        scores: list[CellScore] = []
        for length in grid.lengths:
            start = time.perf_counter()
            scores += score_cells(model, self._builder, grid.cells(length), grid.samples, phase.rope_base)
            by_length[length] = time.perf_counter() - start
        laps = {length: self._builder.haystack.laps(length) for length in grid.lengths}
        repeats = {length: times for length, times in laps.items() if times > 1}
        took = time.perf_counter() - began
        report.needles(progress, NeedleResult(phase.name, scores, grid.samples, repeats, took))
        by_length, took = on_main(lambda: (by_length, time.perf_counter() - began))
        self._costs.measured(grid, by_length, took)
        self._spent, self._last = self._spent + took, progress.step

    def _plan_rest(self, phase: PhaseConfig, step: int, left: int, report: NeedleReport) -> None:
        """Plan the rest of the phase by what evaluations and steps have taken, and say so if it is another plan."""
        assert self._wanted is not None
        share, every = self._options.max_share, self._options.needles.every
        step_seconds = on_main(lambda: median(self._seconds))
        seconds = allowance(share, step_seconds, step + left - self._begin, self._spent)
        before, self._planned = self._plan, True
        self._plan = fit(self._wanted, self._costs.of, seconds, step + left - self._last, every)
        if self._plan != before:
            cost = f"{self._wanted} takes {self._costs.of(self._wanted):.1f} s, a step {step_seconds:.2f} s"
            report.note(f"needles: {cost}; to keep evals.max_share={share:g} of phase {phase.name}: "
                        f"{_words(self._plan, self._wanted)}")  # fmt: skip


def _words(plan: Plan, wanted: Grid) -> str:
    if plan.grid is None:
        return "none in the rest of it; raise evals.max_share, or give fewer lengths or samples"
    what = "all of it" if plan.grid == wanted else str(plan.grid)
    return f"{what}, {f'every {plan.every:,} steps' if plan.every else 'at its end only'}"


def needle_evaluation(
    config: PretrainConfig,
    phases: Sequence[PhaseConfig],
    units: Sequence[int],
    held_out: Split | None,
    tokenizer: Tokenizer,
    source: str,
) -> NeedleEvaluation | None:
    """Return the evaluation of needles of a run, or None where it is off. Nothing is loaded for it.

    Args:
        config: of the run.
        phases: its phases with their scales applied.
        units: of each phase, what the tokens of a row must be a multiple of under its layout.
        held_out: documents to hide needles in.
        tokenizer: the run's.
        source: of the documents, for messages.

    Raises:
        ConfigError: there is no held-out text, or a length cannot be built or is never run.
    """
    if not config.evals.needles.enabled:
        return None
    haystack = Haystack(held_out, source, tokenizer, config.model.vocab_size)
    builder = SampleBuilder(haystack, tokenizer, config.data.seed)
    return NeedleEvaluation(config.evals, check_grids(config.evals.needles, phases, builder, units), builder)
