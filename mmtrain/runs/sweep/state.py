"""What has become of a sweep's runs, read off their folders, and where a sweep keeps its files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.durable import write_text
from mmtrain.config.sweep import SweepConfig
from mmtrain.log.metrics import FILE_NAME, read_metrics
from mmtrain.runs.sweep.grid import SweepRun


class SweepFolder:
    """Paths of one sweep: its definition, its runs' folders and logs, what it measured.

    Attributes:
        path: the sweep's folder.
        definition: what the sweep is, as JSON.
        outcomes: a file for each run that has ended, with its exit code and reason.
        runs: folder of the runs' folders.
        logs: what the runs' processes wrote to the terminal.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self.path = Path(sweep.dir) / sweep.name
        self.definition = self.path / "sweep.json"
        self.outcomes = self.path / "outcomes"
        self.timings = self.path / "timings.json"
        self.runs = self.path / "runs"
        self.logs = self.path / "logs"

    def log(self, run: SweepRun) -> Path:
        """Return the file of what a run's processes write."""
        return self.logs / f"{run.name}.txt"

    def add_outcome(self, run: str, code: int, reason: str) -> None:
        """Put on record how a run ended; a file of its own, as Slurm's jobs may write from several hosts.

        Raises:
            OSError: it cannot be written.
        """
        self.outcomes.mkdir(parents=True, exist_ok=True)
        write_text(self._outcome(run), json.dumps({"exit_code": code, "reason": reason}) + "\n")

    def forget_outcome(self, run: str) -> None:
        """Forget how a run ended, as it starts again."""
        self._outcome(run).unlink(missing_ok=True)

    def outcome(self, run: str) -> dict[str, Any] | None:
        """Return the exit code and reason of a run's last end; None for one that has not ended by itself."""
        path = self._outcome(run)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _outcome(self, run: str) -> Path:
        return self.outcomes / f"{run}.json"


class Kind(Enum):
    """State of a run: ``NEW`` has not begun, ``STOPPED`` has begun and can go on, ``FAILED`` needs ``--retry``."""

    NEW = "-"
    STOPPED = "stopped"
    FAILED = "failed"
    DONE = "done"


@dataclass(frozen=True)
class RunState:
    """State of one run.

    Attributes:
        kind: of the state.
        step: the last optimizer step on record, 0 for none.
        loss: of the last validation, in nats a token; None before the end.
        reason: of a failure.
        tokens_per_second: median over its steps; None where it has too few.
    """

    kind: Kind
    step: int = 0
    loss: float | None = None
    reason: str = ""
    tokens_per_second: float | None = None


FIRST_STEPS = 3  # of a launch, which warm up: no measure of pace


def read_states(folder: SweepFolder, runs: Sequence[SweepRun]) -> dict[str, RunState]:
    """Return the state of every run by its name.

    A run is done when its validation at its last step is on record and is a number: that is what the sweep is for.
    """
    return {run.name: _state(records(folder, run), run, folder.outcome(run.name)) for run in runs}


def records(folder: SweepFolder, run: SweepRun) -> list[dict[str, Any]]:
    """Return a run's records; none for a run that has not begun."""
    path = folder.runs / run.name
    return read_metrics(path) if (path / FILE_NAME).is_file() else []


def _state(found: Sequence[Mapping[str, Any]], run: SweepRun, outcome: Mapping[str, Any] | None) -> RunState:
    steps = [record for record in found if "loss" in record]
    last = max((record["step"] for record in steps), default=0)
    rates = [record["tokens_per_s"] for record in steps[FIRST_STEPS:]]
    pace = statistics.median(rates) if rates else None
    ends = [record.get("val_loss") for record in found if record["step"] == run.steps and "val_loss" in record]
    if ends and ends[-1] is not None and math.isfinite(ends[-1]):
        return RunState(Kind.DONE, last, ends[-1], tokens_per_second=pace)
    if ends:
        return RunState(Kind.FAILED, last, reason="its held-out loss is not finite: lower its learning rate")
    if outcome is not None and outcome["exit_code"]:
        return RunState(Kind.FAILED, last, reason=outcome["reason"], tokens_per_second=pace)
    return RunState(Kind.STOPPED if found else Kind.NEW, last, tokens_per_second=pace)
