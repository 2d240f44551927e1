"""The plan of a sweep: its runs with their cost and time, checked as a whole, as a table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mmtrain.config.sweep import SweepConfig
from mmtrain.runs.sweep.estimate import flops_per_second, makespan, seconds_left
from mmtrain.runs.sweep.grid import SweepRun
from mmtrain.runs.sweep.state import Kind, RunState, SweepFolder
from mmtrain.runs.sweep.words import count_words, time_words

COLUMNS = ("run", "N", "activated", "layers x width", "tokens", "FLOP", "steps", "lr", "points", "time", "state")
WIDE = 200  # columns of a table that no terminal cuts


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as it will be run.

    Attributes:
        sweep: its options.
        folder: of the sweep.
        runs: all of them.
        states: of each run, by name.
        seconds: that each run still takes, by name; None where its pace is not known.
        slots: places for runs at a time.
    """

    sweep: SweepConfig
    folder: SweepFolder
    runs: Sequence[SweepRun]
    states: Mapping[str, RunState]
    seconds: Mapping[str, float | None]
    slots: int

    @staticmethod
    def of(
        sweep: SweepConfig, folder: SweepFolder, runs: Sequence[SweepRun], states: Mapping[str, RunState], slots: int
    ) -> SweepPlan:
        """Price the runs of a sweep."""
        rates = flops_per_second(sweep, folder, runs, states)
        seconds = {run.name: seconds_left(run, states[run.name], rates.get(run.name)) for run in runs}
        return SweepPlan(sweep, folder, runs, states, seconds, slots)

    def to_start(self, retry: bool) -> list[SweepRun]:
        """Return the runs that are to be started, the longest first, so that slots end together.

        Args:
            retry: those too that failed.
        """
        kinds = {Kind.NEW, Kind.STOPPED, *([Kind.FAILED] if retry else [])}
        wanted = [run for run in self.runs if self.states[run.name].kind in kinds]
        return sorted(wanted, key=lambda run: -(self.seconds[run.name] or run.flops))

    def lines(self) -> list[str]:
        """Return the table, and lines on the total and on what counts as a point."""
        table = Table(box=None, pad_edge=False)
        for title in COLUMNS:
            table.add_column(title, justify="left" if title in ("run", "state") else "right", no_wrap=True)
        for run in self.runs:
            table.add_row(*self._row(run))
        text = io.StringIO()
        Console(file=text, width=WIDE).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return [*lines, "", self._total(), *self._notes()]

    def _row(self, run: SweepRun) -> list[str]:
        state, shape = self.states[run.name], run.shape
        told = f"loss {state.loss:.4f}" if state.loss is not None else state.kind.value
        told = f"{told} at step {state.step:,}" if state.kind is Kind.STOPPED else told
        return [run.name, count_words(run.parameters), count_words(run.activated),
                f"{shape.num_layers} x {shape.hidden_size}", count_words(run.tokens), f"{run.flops:.2e}",
                f"{run.steps:,}", f"{run.learning_rate:.2e}", str(len(set(run.usable_steps))),
                time_words(self.seconds[run.name]), told]  # fmt: skip

    def _total(self) -> str:
        left = self.to_start(retry=False)
        known = [seconds for run in left if (seconds := self.seconds[run.name]) is not None]
        flops = sum(run.flops for run in self.runs)
        where = "Slurm jobs" if self.sweep.runner == "slurm" else f"{self.slots} at once here"
        text = f"{len(self.runs)} runs, {flops:.2e} FLOP in all; {len(left)} to start, {where}"
        if not left:
            return text
        if len(known) < len(left):
            return f"{text}: time unknown, as nothing was timed (--timing, or give sweep.flops_per_second)"
        if self.sweep.runner == "slurm":
            return f"{text}: {time_words(sum(known))} of jobs"
        return f"{text}: {time_words(makespan(known, self.slots))}"

    def _notes(self) -> list[str]:
        sweep = self.sweep
        lines = [
            "FLOP: forward and backward, head and attention counted, over rows that are one document of "
            f"{sweep.seq_len:,}; N: parameters without embeddings"
        ]
        if sweep.schedule == "constant":
            lines.append(f"points: every validation past the warm-up ({sweep.validations} a run), as the learning rate "
                         "is constant")  # fmt: skip
        else:
            lines.append(f"points: each run's last validation alone, as its learning rate decays ({sweep.schedule})")
        return lines

    def failures(self) -> list[str]:
        """Return a line on each run that failed: why, and where its output is."""
        failed = [run for run in self.runs if self.states[run.name].kind is Kind.FAILED]
        return [f"failed  {run.name}: {self.states[run.name].reason} ({self.folder.log(run)})" for run in failed]
