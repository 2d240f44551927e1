"""A run of a sweep as a job of submitit: what is pickled here and called on the node."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.runs.sweep.process import failure_reason
from mmtrain.runs.sweep.state import SweepFolder


class RunJob:
    """Starts a run's launcher, and puts its end on record in the sweep's folder.

    Args:
        command: of the run.
        folder: of the sweep, which the node must see under the same path.
        name: of the run.
    """

    def __init__(self, command: Sequence[str], folder: SweepFolder, name: str) -> None:
        self._command, self._folder, self.name, self._cwd = list(command), folder, name, Path.cwd()
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None}

    def __call__(self) -> int:
        """Run it to its end; returns its exit code."""
        self._folder.forget_outcome(self.name)
        log = self._folder.logs / f"{self.name}.txt"
        with log.open("w", encoding="utf-8") as file:
            # The job's own task would be taken for the run's rank; torchrun or plain Python starts it.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
            self._process = subprocess.Popen(self._command, stdout=file, stderr=subprocess.STDOUT, cwd=self._cwd,
                                             env=environment, start_new_session=True)  # fmt: skip
        code = self._process.wait()
        self._folder.add_outcome(self.name, code, failure_reason(log, code) if code else "")
        return code

    def checkpoint(self) -> Any:
        """Let the run save itself before the time limit; submitit calls it, and queues what it returns."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
        return DelayedSubmission(RunJob(self._command, self._folder, self.name))
