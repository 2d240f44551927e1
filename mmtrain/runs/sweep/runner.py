"""Runs of a sweep on this machine: as many at a time as there are slots, each in processes of its own."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mmtrain.config.sweep import SweepConfig
from mmtrain.parallel.memory.predict import GIB
from mmtrain.runs.sweep.grid import SweepRun
from mmtrain.runs.sweep.process import RunProcess, place_of, run_command
from mmtrain.runs.sweep.slots import Slot
from mmtrain.runs.sweep.state import Kind, SweepFolder, read_states
from mmtrain.runs.sweep.words import time_words

HELD = "another launch of this run is at work"  # of a run folder's lock
POLL_SECONDS = 0.5
SHOW_SECONDS = 2.0  # between looks at the records of runs at work, on a terminal


class LocalRunner:
    """Starts the runs of a sweep in the slots of this machine.

    Args:
        launcher: launch/pretrain.py.
        sweep: how runs are started.
        folder: of the sweep; the caller holds its lock.
        slots: of this machine.
        after_run: is called after each run that has ended.
        check: raises if this sweep may not go on, as when it has lost its lock.
    """

    def __init__(
        self,
        launcher: Path,
        sweep: SweepConfig,
        folder: SweepFolder,
        slots: Sequence[Slot],
        after_run: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        self._launcher, self._sweep, self._folder, self._slots = launcher, sweep, folder, slots
        self._after_run, self._check = after_run, check

    def run(self, runs: Sequence[SweepRun]) -> None:
        """Run all of these, in this order; a run that fails is put on record, and the others go on.

        Raises:
            KeyboardInterrupt: Ctrl-C, or SIGTERM; the runs at work have been asked to save themselves.
        """
        waiting, free, at_work = list(runs), list(self._slots), []
        with _as_interrupt(signal.SIGTERM), _Display(self._folder, len(runs)) as display:
            try:
                while waiting or at_work:
                    while waiting and free:
                        at_work.append(self._start(waiting.pop(0), free.pop(0)))
                        display.started(at_work[-1].run)
                    time.sleep(POLL_SECONDS)
                    self._check()
                    for process in [one for one in at_work if one.poll() is not None]:
                        at_work.remove(process)
                        free.append(process.slot)
                        display.ended(process.run, self._record(process))
                    display.refresh()
            finally:
                _stop(at_work)

    def _start(self, run: SweepRun, slot: Slot) -> RunProcess:
        shared = slot.device_bytes is not None and self._sweep.runs_at_once > 1
        share = [f"cluster.device_memory_gib={slot.device_bytes / GIB:.1f}"] if shared else []
        command = run_command(self._launcher, self._sweep, [*share, *run.overrides, *place_of(self._folder, run)])
        self._folder.forget_outcome(run.name)
        return RunProcess(command, run, slot, self._folder.log(run))

    def _record(self, process: RunProcess) -> str:
        """Put the end of a run on record, and return the line that tells it."""
        run, code = process.run, process.poll() or 0
        self._after_run()
        state = read_states(self._folder, [run])[run.name]
        if state.kind is Kind.DONE:
            self._folder.add_outcome(run.name, 0, "")
            return f"done    {run.name}: loss {state.loss:.4f}"
        reason = state.reason or (process.reason() if code else "it ended without a validation at its last step")
        if HELD in reason:  # it is at work: a sweep that was killed left it behind, or someone else started it
            return f"held    {run.name}: {reason}"
        self._folder.add_outcome(run.name, code or 1, reason)
        return f"failed  {run.name}: {reason}"


def _stop(processes: Sequence[RunProcess]) -> None:
    """Ask runs to save themselves, and wait until they have."""
    for process in processes:
        process.ask_to_stop()
    for process in processes:
        process.wait_or_kill()


@contextmanager
def _as_interrupt(number: signal.Signals) -> Iterator[None]:
    """Take a signal as Ctrl-C is taken."""

    def interrupt(received: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


class _Display:
    """Bars on a terminal, lines elsewhere: how far the sweep and the runs at work are."""

    def __init__(self, folder: SweepFolder, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bars = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
        self._folder, self._all = folder, self._bars.add_task("runs", total=total)
        self._tasks: dict[str, tuple[SweepRun, TaskID, float]] = {}
        self._shown = 0.0

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def started(self, run: SweepRun) -> None:
        self._tasks[run.name] = run, self._bars.add_task(run.name, total=run.steps), time.monotonic()
        self._tell(f"start   {run.name}")

    def ended(self, run: SweepRun, line: str) -> None:
        _, task, since = self._tasks.pop(run.name)
        self._bars.remove_task(task)
        self._bars.advance(self._all)
        self._tell(f"{line} ({time_words(time.monotonic() - since)})")

    def refresh(self) -> None:
        if self._bars.disable or time.monotonic() - self._shown < SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        states = read_states(self._folder, [run for run, _, _ in self._tasks.values()])
        for name, (_, task, _) in self._tasks.items():
            self._bars.update(task, completed=states[name].step)

    def _tell(self, line: str) -> None:
        if self._bars.disable:
            print(line, flush=True)
        else:
            self._bars.console.print(line, highlight=False, markup=False)
