"""Timing runs: a few steps of every architecture and size, from which a plan's seconds follow."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mmtrain.checkpoint.durable import write_text
from mmtrain.config.sweep import SweepConfig
from mmtrain.errors import ConfigError
from mmtrain.log.metrics import read_metrics
from mmtrain.runs.sweep.estimate import read_timings
from mmtrain.runs.sweep.grid import SweepRun
from mmtrain.runs.sweep.process import failure_reason, run_command
from mmtrain.runs.sweep.slots import Slot
from mmtrain.runs.sweep.state import FIRST_STEPS, SweepFolder

STEPS = 8  # the first three warm up


def time_sizes(
    launcher: Path,
    sweep: SweepConfig,
    folder: SweepFolder,
    runs: Sequence[SweepRun],
    slot: Slot,
    note: Callable[[str], None],
) -> None:
    """Time every architecture and size that has not been timed, one after another, and keep the figures.

    A run has the slot to itself here: runs that share a GPU or a CPU are slower each.

    Raises:
        ConfigError: one of them cannot run; the message is the run's own.
        OSError: the figures cannot be written.
    """
    known = read_timings(folder)
    for run in {(run.architecture, run.size): run for run in runs}.values():
        if (run.architecture, run.size) in known:
            continue
        rate = _rate(launcher, sweep, run, slot)
        note(f"timed {run.architecture} {run.size}: {rate / run.flops_per_token:,.0f} tokens/s, {rate:.3g} FLOP/s")
        known[run.architecture, run.size] = rate
        folder.path.mkdir(parents=True, exist_ok=True)
        entries = [{"architecture": architecture, "size": size, "flops_per_second": value}
                   for (architecture, size), value in known.items()]  # fmt: skip
        write_text(folder.timings, json.dumps(entries, indent=1) + "\n")


def _rate(launcher: Path, sweep: SweepConfig, run: SweepRun, slot: Slot) -> float:
    """Return the operations a second of one run: the median over the steps after the first ones."""
    with tempfile.TemporaryDirectory(prefix="mmtrain_timing_") as place:
        own = [f"run.dir='{place}'", "run.name=timing", f"run.max_steps={min(STEPS, run.steps)}", "data.valid_rows=0",
               "checkpoint.save_final=false", "log.valid_interval=0"]  # fmt: skip
        log = Path(place) / "log.txt"
        with log.open("w", encoding="utf-8") as file:
            command = run_command(launcher, sweep, [*run.overrides, *own])
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                  env=slot.environment(), check=False)  # fmt: skip
        if done.returncode:
            reason = failure_reason(log, done.returncode).removeprefix("error: ")
            raise ConfigError("--timing", run.name, reason, "correct the options of this run")
        steps = [record for record in read_metrics(Path(place) / "timing") if "loss" in record]
    kept = steps[FIRST_STEPS:] or steps
    return run.flops_per_token * statistics.median(record["tokens_per_s"] for record in kept)
