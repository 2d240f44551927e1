"""Comparison of layouts: a few steps under each, in processes of its own, printed side by side.

Losses and norms say little about a small part of the model: the experts hold 0.2% of the squared norm of a small
hybrid's gradient, so an error of 0.3% in theirs changes the norm by 6e-6. Every parameter's gradient is therefore
compared too, at the first step, where no update has yet made much of small differences.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from mmtrain.errors import ConfigError
from mmtrain.log.gradients import GradientRecord, gradient_differences
from mmtrain.log.metrics import FILE_NAME, read_metrics

FIGURES = ("loss", "grad_norm")
POLL_SECONDS = 0.2


class Tolerance(NamedTuple):
    """Largest relative differences that are put down to rounding.

    Measured over dp, tp, ep, pp and tp x ep on a hybrid of four layers: in fp32 2e-7 of a figure and of a parameter's
    gradient; in bf16 3e-4 of a figure, and 4e-2 of a gradient, which is a router's, where most of it cancels.

    Attributes:
        figures: of losses and norms.
        gradients: of a parameter's gradient.
    """

    figures: float
    gradients: float


TOLERANCES = {"float32": Tolerance(5e-6, 1e-5), "bfloat16": Tolerance(2e-3, 2e-1)}


@dataclass(frozen=True)
class LayoutRun:
    """A layout as the user wrote it: number of processes, then Hydra overrides."""

    text: str

    def __post_init__(self) -> None:
        first = self.text.split()[:1]
        if not first or not first[0].isdigit() or int(first[0]) < 1:
            raise ConfigError("--layout", self.text, "must begin with the number of processes",
                              'for example --layout "4 parallel.tp=2 parallel.ep=2"')  # fmt: skip

    @property
    def processes(self) -> int:
        """Number of processes to start."""
        return int(self.text.split()[0])

    @property
    def overrides(self) -> list[str]:
        """Hydra overrides that belong to this layout alone."""
        return self.text.split()[1:]


def compare(
    launcher: Path,
    layouts: Sequence[str],
    overrides: Sequence[str],
    steps: int,
    tolerance: float | None = None,
    keep: str | None = None,
) -> int:
    """Run every layout, print the table, and say whether they agree.

    Args:
        launcher: the script that torchrun starts for each, `launch/pretrain.py`.
        layouts: two or more; the first is what the others are compared with.
        overrides: Hydra overrides of all.
        steps: optimizer steps.
        tolerance: largest relative difference allowed, of figures and gradients; None: by precision (TOLERANCES).
        keep: folder of the runs; None: one that goes away.

    Returns:
        0, or 1 if a figure or a parameter's gradient differs by more than the tolerance or is no number.

    Raises:
        ConfigError: fewer than two layouts, or one that cannot run; its message is the run's own.
    """
    runs = [LayoutRun(text) for text in layouts]
    for ok, option, value, problem in (
        (len(runs) > 1, "--layout", " ".join(layouts), "needs at least two layouts"),
        (steps >= 1, "--steps", steps, "must be at least 1"),
        (tolerance is None or 0 < tolerance < math.inf, "--tolerance", tolerance, "must be a number above 0"),
    ):
        if not ok:
            raise ConfigError(option, value, problem, "see launch/compare.py --help")
    with contextlib.ExitStack() as stack:
        folder = keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="mmtrain_compare_"))
        records, gradients = [], []
        for number, run in enumerate(runs):
            print(f"layout {number}: {run.text}", flush=True)
            records.append(_train(launcher, run, overrides, steps, Path(folder), f"layout{number}"))
            gradients.append(GradientRecord.read(Path(folder) / f"layout{number}"))
    allowed = _tolerance(tolerance, gradients)
    found = (("figure", *_print_table(records), allowed.figures),
             ("gradient", *_print_gradients(gradients, allowed.gradients), allowed.gradients))  # fmt: skip
    agree = True
    for kind, worst, where, limit in found:
        agree &= worst <= limit
        verdict = "equal" if worst <= limit else "DIFFERENT"
        print(f"largest relative difference of a {kind} {worst:.1e}{where}, tolerance {limit:.0e}: {verdict}")
    if keep:
        print(f"runs: {keep}")
    return 0 if agree else 1


def _train(
    launcher: Path, run: LayoutRun, overrides: Sequence[str], steps: int, folder: Path, name: str
) -> list[dict[str, Any]]:
    """Run one layout; return the records of its steps.

    Raises:
        ConfigError: the run failed; the message is its own error line, or the end of its log.
    """
    own = [f"run.dir={folder}", f"run.name={name}", f"run.max_steps={steps}", "checkpoint.save_final=false",
           "checkpoint.interval=0", "log.wandb=off", "log.plot=false", "log.valid_interval=0",
           "log.gradient_fingerprints=true"]  # fmt: skip
    defaults = [] if any(text.startswith("optim.precision=") for text in overrides) else ["optim.precision=fp32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.processes),
               str(launcher), *defaults, *overrides, *own, *run.overrides]  # fmt: skip
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=_environment(run.processes))
        try:
            _wait(process, folder / name, steps)
        finally:
            process.terminate()  # nothing to one that has ended
            process.wait()
        log.seek(0)
        lines = log.read().strip().splitlines()
    if process.returncode != 0:
        told = next((line for line in lines if line.startswith("error: ")), None)
        raise ConfigError("--layout", run.text, (told or "\n".join(lines[-30:]) or "failed").removeprefix("error: "),
                          "correct the layout or the options")  # fmt: skip
    return _steps(folder / name)


def _wait(process: subprocess.Popen[bytes], run: Path, steps: int) -> None:
    """Wait until the process ends; a bar on a terminal shows the steps that it has recorded."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("steps", total=steps)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if (run / FILE_NAME).is_file():
                progress.update(task, completed=len(_steps(run)))


def _steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if "loss" in record]


def _environment(processes: int) -> dict[str, str]:
    """Environment of a run whose processes share the machine's cores out, so that they do not fight for them."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _print_table(runs: Sequence[Sequence[dict[str, Any]]]) -> tuple[float, str]:
    """Print a line a step; return the largest relative difference to the first run, and where it is."""
    titles = [f"{figure} [{number}]" for figure in FIGURES for number in range(len(runs))]
    print("step  " + "  ".join(f"{title:>16}" for title in titles) + "  relative difference")
    worst, where = 0.0, ""
    for records in zip(*runs, strict=True):
        values = {figure: [_number(record[figure]) for record in records] for figure in FIGURES}
        found = {(figure, number): relative_difference(first, other) for figure, (first, *others) in values.items()
                 for number, other in enumerate(others, 1)}  # fmt: skip
        step, here = records[0]["step"], max(found, key=found.get)
        if found[here] > worst:
            worst, where = found[here], f" ({here[0]} of layout {here[1]}, step {step})"
        cells = "  ".join(f"{value:16.8f}" for row in values.values() for value in row)
        print(f"{step:4d}  {cells}  {found[here]:.1e}")
    return worst, where


def _tolerance(asked: float | None, runs: Sequence[GradientRecord]) -> Tolerance:
    """What was asked for, or the widest of the runs' precisions."""
    if asked is not None:
        return Tolerance(asked, asked)
    return max(TOLERANCES[run.precision] for run in runs)


def _print_gradients(runs: Sequence[GradientRecord], limit: float) -> tuple[float, str]:
    """Print a line a layout; return the largest difference of a parameter's gradient to the first's, and where."""
    width = max(len(name) for run in runs for name in run.parameters)
    print(
        f"gradients of step 1, by parameter\nlayout  {'worst parameter':{width}}  difference   median  above tolerance"
    )
    worst, where = 0.0, ""
    for number, run in enumerate(runs[1:], 1):
        found = gradient_differences(runs[0], run)
        name = max(found, key=found.get)
        above = sum(difference > limit for difference in found.values())
        median = statistics.median(found.values())
        print(f"{number:6d}  {name:{width}}  {found[name]:10.1e}  {median:7.1e}  {above} of {len(found)}")
        if found[name] > worst:
            worst, where = found[name], f" ({name} of layout {number})"
    return worst, where


def _number(value: float | None) -> float:
    """A figure of a record as a float: null, which stands for NaN and infinity, becomes NaN."""
    return math.nan if value is None else float(value)


def relative_difference(first: float, other: float) -> float:
    """|other - first| / |first|; infinite where one is no number, or only one is zero."""
    if first == other:
        return 0.0
    difference = abs(other - first) / abs(first) if first else math.inf
    return difference if math.isfinite(difference) else math.inf
