"""Seconds of a sweep's runs, from measured rates or a given one, and of the whole sweep on its slots."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence

from mmtrain.config.sweep import SweepConfig
from mmtrain.runs.sweep.grid import SweepRun
from mmtrain.runs.sweep.state import Kind, RunState, SweepFolder

START_SECONDS = 12.0  # of a run's processes until the first step: 8 to 15 were seen on a CPU and on a GPU


def flops_per_second(
    sweep: SweepConfig, folder: SweepFolder, runs: Sequence[SweepRun], states: Mapping[str, RunState]
) -> dict[str, float]:
    """Return the operations a second of every run for which they are known.

    A run's own pace comes first, then that of another run of its architecture and size, a timing run's (`--timing`),
    and `sweep.flops_per_second`.
    """
    measured: dict[tuple[str, str], float] = read_timings(folder)
    for run in runs:
        if (pace := states[run.name].tokens_per_second) is not None:
            measured[run.architecture, run.size] = pace * run.flops_per_token
    found = {}
    for run in runs:
        pace = states[run.name].tokens_per_second
        rate = (
            pace * run.flops_per_token if pace else measured.get((run.architecture, run.size), sweep.flops_per_second)
        )
        if rate:
            found[run.name] = rate
    return found


def seconds_left(run: SweepRun, state: RunState, rate: float | None) -> float | None:
    """Return the seconds that a run still takes; None where its pace is not known, 0 for one that is done."""
    if state.kind is Kind.DONE:
        return 0.0
    return None if rate is None else START_SECONDS + run.flops / rate


def makespan(seconds: Sequence[float], slots: int) -> float:
    """Return the seconds until all runs are done, each taken by the first free slot, in this order."""
    free = [0.0] * slots
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def read_timings(folder: SweepFolder) -> dict[tuple[str, str], float]:
    """Return operations a second by architecture and size, as timing runs measured them."""
    if not folder.timings.is_file():
        return {}
    entries = json.loads(folder.timings.read_text(encoding="utf-8"))
    return {(one["architecture"], one["size"]): one["flops_per_second"] for one in entries}
