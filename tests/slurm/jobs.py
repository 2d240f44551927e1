"""Jobs on the Slurm that cluster.sh brings up: submitted, watched and waited for."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmtrain.runs.slurm.submit import SINGLE, Chain, prepare_job, submit_job
from tests.dist.runs import ROOT, SMALL, environment, steps

CLUSTER = Path(__file__).with_name("cluster.sh")
PARTS = [*SMALL, "parallel.ep=2", "data.valid_rows=0", "stage.token_scale=6"]  # 48 steps
WAIT_SECONDS = 180
SETTLE_SECONDS = 6


def slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def wait(what: str, found: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s\n{slurm('squeue')}"
        time.sleep(0.2)


def nodes_are_idle() -> bool:
    return slurm("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%t").split() == ["idle", "idle"]


@dataclass
class Job:
    """A run's jobs and folder."""

    run: Path
    ids: list[str]
    _waits_since: float | None = None

    def fact(self, name: str, index: int = 0) -> str:
        shown = slurm("scontrol", "show", "job", "--oneliner", self.ids[index])
        return re.search(rf"\b{name}=(\S*)", shown)[1]

    def state(self, index: int = 0) -> str:
        return self.fact("JobState", index)

    @property
    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.run / "slurm").glob("job-*.out")))

    def wait_for_steps(self, count: int) -> None:
        def there() -> bool:
            assert self.state() in ("PENDING", "CONFIGURING", "RUNNING"), f"{self.state()}\n{self.log[-4000:]}"
            return (self.run / "metrics.jsonl").exists() and len(steps(self.run)) >= count

        wait(f"{count} steps", there)

    def hasten(self, index: int = 0) -> None:
        """Let a job that is back in the queue start soon: Slurm would wait for two minutes.

        Not at once, as slurmd refuses a job that it is still clearing away, and no node may be doing that.
        """
        waits = self.state(index) == "PENDING" and self.fact("Reason", index) == "BeginTime"
        if not waits:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = time.monotonic()
        elif time.monotonic() - self._waits_since > SETTLE_SECONDS and nodes_are_idle():
            slurm("scontrol", "update", f"JobId={self.ids[index]}", "StartTime=now")
            self._waits_since = None

    def wait_for_restart(self, count: int = 1) -> None:
        wait("a restart", lambda: int(self.fact("Restarts")) >= count)

    def wait_for(self, state: str, index: int = 0) -> None:
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", state}

        def ended() -> bool:
            self.hasten(index)
            return self.state(index) in ends

        wait(state, ended)
        assert self.state(index) == state, self.log[-6000:]


def submit(
    corpus: Path, folder: Path, name: str, *more: str, chain: Chain = SINGLE, launch: Path = ROOT / "launch"
) -> Job:
    """Submit a small run of two nodes, each with one rank."""
    options = [*PARTS, "cluster=slurm_cpu", f"cluster.shared_roots=[{folder},{corpus},{ROOT}]", f"run.dir={folder}",
               f"run.name={name}", f"data.path={corpus}", "cluster.partition=debug", *more]  # fmt: skip
    return Job(folder / name, submit_job(prepare_job(options, launch, ROOT / "configs", chain)))


def numbers(run: Path) -> list[tuple]:
    """What must be equal to the last bit between two runs, of each step."""
    return [(row["step"], row["loss"], row["grad_norm"], row["aux_loss"], row["tokens"]) for row in steps(run)]


def cluster(*command: str) -> None:
    subprocess.run([CLUSTER, *command], check=True, timeout=60, env=environment())
