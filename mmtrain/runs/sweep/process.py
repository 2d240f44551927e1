"""Process of one run of a sweep: the ordinary launcher with the run's options, its output in a file."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmtrain.config.sweep import SweepConfig
from mmtrain.runs.sweep.grid import SweepRun
from mmtrain.runs.sweep.slots import Slot
from mmtrain.runs.sweep.state import SweepFolder

# On Linux a run is asked to stop when its sweep dies, however it does: PR_SET_PDEATHSIG with SIGTERM, which exec keeps.
WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
STOP_SECONDS = 60.0  # that a run gets to save itself before it is killed


def run_command(launcher: Path, sweep: SweepConfig, overrides: Sequence[str]) -> list[str]:
    """Return the command of a run: torchrun where it has several processes."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(sweep.processes)]
    return [sys.executable, *(several if sweep.processes > 1 else []), str(launcher), *overrides]


def place_of(folder: SweepFolder, run: SweepRun) -> list[str]:
    """Return the overrides that say where a run lies, and that it goes on where it stopped."""
    return [f"run.dir='{folder.runs}'", f"run.name='{run.name}'", "run.resume=auto"]


class RunProcess:
    """A run at work in a slot.

    Attributes:
        run: that it trains.
        slot: that it takes.
    """

    def __init__(self, command: Sequence[str], run: SweepRun, slot: Slot, log: Path) -> None:
        self.run, self.slot, self._log = run, slot, log
        log.parent.mkdir(parents=True, exist_ok=True)
        if sys.platform == "linux":
            command = [sys.executable, "-c", WITH_PARENT, *command]
        with log.open("w", encoding="utf-8") as file:  # what an earlier launch wrote is of no use any more
            # A session of its own: Ctrl-C reaches the sweep alone, which then asks its runs once each.
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                             env=slot.environment(), start_new_session=True)  # fmt: skip

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Ask the run to save itself and stop."""
        if self.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait_or_kill(self, seconds: float = STOP_SECONDS) -> None:
        """Wait for a run that was asked to stop; kill it if it takes longer."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def reason(self) -> str:
        """Return why the run failed: the last error line of its output, else its last line."""
        return failure_reason(self._log, self.poll())


def failure_reason(log: Path, code: int | None) -> str:
    """Return the last line of a log that says ``error``, else its last line, else the exit code."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or [f"exit code {code}"])[-1]
