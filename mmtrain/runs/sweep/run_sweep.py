"""A sweep from its command line to its points: planned, checked, started where it stopped, and fitted."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmtrain.checkpoint.lock import RunLock
from mmtrain.errors import ConfigError
from mmtrain.output import say
from mmtrain.runs.sweep.checks import check_fit, check_runs
from mmtrain.runs.sweep.command import Request, read_request
from mmtrain.runs.sweep.definition import check_definition, definition_of, write_definition
from mmtrain.runs.sweep.finish import fit_and_tell
from mmtrain.runs.sweep.grid import SweepRun, grid_runs, settings_of, without_corpus
from mmtrain.runs.sweep.plan import SweepPlan
from mmtrain.runs.sweep.points import save_points
from mmtrain.runs.sweep.runner import LocalRunner
from mmtrain.runs.sweep.slots import Slot, local_slots
from mmtrain.runs.sweep.slurm import check_jobs, submit_runs
from mmtrain.runs.sweep.state import Kind, SweepFolder, read_states
from mmtrain.runs.sweep.timing import time_sizes

LOCK_PATIENCE = 30.0  # seconds for which the lock of another host is watched, twice between its owner's touches


@dataclass(frozen=True)
class SweepOptions:
    """Flags of launch/sweep.py.

    Attributes:
        multirun: options may have several values.
        plan: print the plan and start nothing.
        retry: start those runs too that failed.
        timing: time every architecture and size first.
    """

    multirun: bool = True
    plan: bool = False
    retry: bool = False
    timing: bool = False


def run_sweep(launcher: Path, config_dir: Path, overrides: Sequence[str], options: SweepOptions) -> int:
    """Plan a sweep, and run what is left of it.

    Args:
        launcher: launch/pretrain.py, which every run is started with.
        config_dir: the folder of YAML groups.
        overrides: of the command line.
        options: its flags.

    Returns:
        0, or 1 where runs have failed.

    Raises:
        ConfigError: what cannot work, before anything is started or written.
        KeyboardInterrupt: Ctrl-C; runs at work have saved themselves.
    """
    request = read_request(overrides, options.multirun, config_dir)
    sweep, folder = request.sweep, SweepFolder(request.sweep)
    runs = grid_runs(request, config_dir)
    check_fit(sweep, runs)
    definition = definition_of(request, runs)
    check_definition(folder.definition, definition)
    slots = _slots(request)
    configs = check_runs(sweep, runs, slots[0], config_dir, _note)
    if sweep.runner == "slurm" and not options.plan:
        check_jobs(launcher, sweep, folder, configs)
    if options.timing:
        time_sizes(launcher, sweep, folder, runs, slots[0], _note)
    if options.plan:
        plan = _planned(request, folder, runs, slots)
        say("\n".join([*plan.lines(), *plan.failures()]))
        return 0
    _require_text(request)
    lock = RunLock(folder.path, _note, patience=LOCK_PATIENCE)
    with _held(lock):
        write_definition(folder.definition, definition)
        plan = _planned(request, folder, runs, slots)
        say("\n".join(plan.lines()))
        to_start = plan.to_start(options.retry)
        if sweep.runner == "slurm":
            submit_runs(launcher, sweep, folder, to_start)
        else:
            LocalRunner(launcher, sweep, folder, slots, lambda: _save(folder, runs), lock.check).run(to_start)
        return _end(_planned(request, folder, runs, slots), overrides)


def _planned(request: Request, folder: SweepFolder, runs: Sequence[SweepRun], slots: Sequence[Slot]) -> SweepPlan:
    return SweepPlan.of(request.sweep, folder, runs, read_states(folder, runs), len(slots))


def _slots(request: Request) -> list[Slot]:
    """Return the slots of this machine; of Slurm's machines nothing is known here."""
    if request.sweep.runner == "slurm":
        return [Slot((), request.sweep.threads or request.sweep.slurm.cpus)]
    return local_slots(request.sweep, request.overrides)


def _require_text(request: Request) -> None:
    if any(without_corpus([*request.overrides, *settings]) for settings in settings_of(request.axes)):
        raise ConfigError("data.path", "(missing)", "no corpus given",
                          "prepare one with launch/prepare.py and give data.path=DIR")  # fmt: skip


@contextmanager
def _held(lock: RunLock) -> Iterator[None]:
    """Hold a sweep's folder.

    Raises:
        ConfigError: another launch holds it, or it cannot be written; named as options of the sweep.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except ConfigError as error:
            option, fix = (text.replace("run.", "sweep.") for text in (error.option, error.fix))
            problem = error.problem.replace("of this run", "of this sweep")
            raise ConfigError(option, error.value, problem, fix) from error
        yield


def _save(folder: SweepFolder, runs: Sequence[SweepRun]) -> None:
    save_points(folder, runs)


def _end(plan: SweepPlan, overrides: Sequence[str]) -> int:
    """Write the points, fit them where all runs are done, and say what is where and what comes next."""
    folder, runs = plan.folder, plan.runs
    saved, failed = save_points(folder, runs), plan.failures()
    done = sum(state.kind is Kind.DONE for state in plan.states.values())
    for line in failed:
        say(line)
    again = f"python launch/sweep.py -m {shlex.join(overrides)}"
    following = f"; next: {again}{' --retry' if failed else ''}" if done < len(runs) else ""
    if done == len(runs) and plan.sweep.fit:
        following = f"; next: {fit_and_tell(folder.path)}"
    points = f"{saved[1]} points in {saved[0]}" if saved else "no points yet"
    say(f"{done} of {len(runs)} runs done, {points}; runs in {folder.runs}{following}")
    return 1 if failed else 0


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)
