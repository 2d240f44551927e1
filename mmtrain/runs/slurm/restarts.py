"""Starts of a run by its jobs, kept beside the run, and what is to happen when one has ended: arithmetic and one file.

A job that went back into the queue, and a later link of a chain, are restarts. Two in a row that brought no new
checkpoint stop the chain: what ends them will end the next one too, and each costs the time of all its nodes.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmtrain.checkpoint.durable import write_text
from mmtrain.checkpoint.listing import all_checkpoints, step_of
from mmtrain.errors import OutOfDeviceMemory, RunStopped

FILE = "restarts.json"
FRUITLESS = 2  # restarts in a row
SAVED = {128 + int(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
USELESS = {2, RunStopped.NOT_FINITE, OutOfDeviceMemory.EXIT_CODE}  # would end so again
NODES_MISSING = 7  # of the job script: too few nodes passed the pre-flight

FINISHED, REQUEUE, HAND_OVER, STOP = "finished", "requeue", "hand_over", "stop"


@dataclass(frozen=True)
class JobStart:
    """One start of the run by a job.

    Attributes:
        job: Slurm's number of the job.
        first: it begins a chain, so that it is no restart.
        step: the newest checkpoint's when it began; 0 for none.
        reached: the newest checkpoint's when it had ended; None while it runs, or where its node died.
        ending: what was decided then.
    """

    job: str
    first: bool
    step: int
    reached: int | None = None
    ending: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Decision on what follows a job's end.

    Attributes:
        action: FINISHED, REQUEUE (this job again), HAND_OVER (to the next link of the chain) or STOP.
        exit_code: of the job; 0 lets the next link start.
        reason: one line.
    """

    action: str
    exit_code: int
    reason: str


def newest_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 for none."""
    found = all_checkpoints(run / "checkpoints")
    return step_of(found[-1]) if found else 0


def read_starts(folder: Path) -> list[JobStart]:
    """Return the recorded starts, oldest first; none where the file is missing or cannot be read."""
    try:
        return [JobStart(**one) for one in json.loads((folder / FILE).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def write_starts(folder: Path, starts: list[JobStart]) -> None:
    """Replace the record of all starts, at once."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps([asdict(one) for one in starts], indent=1) + "\n")


def fruitless(starts: list[JobStart], step: int) -> int:
    """Return how many restarts in a row, the last ones, brought no new checkpoint.

    Args:
        starts: of the run.
        step: the newest checkpoint's now.
    """
    count, end = 0, step
    for start in reversed(starts):
        if start.first or end > start.step:
            break
        count, end = count + 1, start.step
    return count


def begin(starts: list[JobStart], job: str, first: bool, step: int) -> tuple[list[JobStart], Verdict | None]:
    """Enter a start, unless the chain has come to its end.

    Returns:
        The starts to record, and a verdict where the job has nothing to do.
    """
    if not first and starts and starts[-1].ending in (FINISHED, STOP):
        done = starts[-1].ending == FINISHED
        reason = "the run is finished" if done else "an earlier job of this chain stopped it; submit it anew to go on"
        return starts, Verdict(starts[-1].ending, 0 if done else 1, reason)
    if not first and fruitless(starts, step) >= FRUITLESS:
        starts = [*starts[:-1], replace(starts[-1], ending=STOP)]
        return starts, Verdict(STOP, 1, _no_progress(step))
    return [*starts, JobStart(job, first, step)], None


def judge(starts: list[JobStart], codes: Collection[int], code: int, step: int, last_link: bool) -> Verdict:
    """Decide what follows the end of a start, the last one of `starts`.

    Args:
        starts: of the run.
        codes: exit codes of the ranks, as far as they wrote one.
        code: of srun.
        step: the newest checkpoint's now.
        last_link: no job of the chain is behind this one.
    """
    if code == 0:
        return Verdict(FINISHED, 0, "the run is finished")
    final = USELESS & set(codes) or ({code} & USELESS if not codes else set())
    if final:
        worst = min(final)
        return Verdict(
            STOP, worst, f"the run ended with code {worst}, and would again; docs/first-run.md says what it means"
        )
    if fruitless(starts, step) >= FRUITLESS:
        return Verdict(STOP, code, _no_progress(step))
    if SAVED & set(codes) or code in SAVED:
        if not last_link:
            return Verdict(HAND_OVER, 0, f"saved after step {step:,}; the next link of the chain goes on")
        return Verdict(REQUEUE, code, f"saved after step {step:,}; this job goes on when it comes back")
    if code == NODES_MISSING:
        return Verdict(REQUEUE, code, "too few nodes passed the pre-flight")
    named = ", ".join(str(one) for one in sorted(set(codes) - {0})) or "none"
    return Verdict(
        REQUEUE, code, f"the run broke off (exit codes of ranks: {named}); this job goes on from step {step:,}"
    )


def _no_progress(step: int) -> str:
    return (
        f"stopped: {FRUITLESS} restarts in a row brought no new checkpoint, the newest is of step {step:,}; see the "
        "logs of their ranks for the cause, and submit the run again when it is mended"
    )
