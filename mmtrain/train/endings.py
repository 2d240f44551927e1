"""Ends of a run before its plan is done: what is told of each, with the way on, and the exit code."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from mmtrain.checkpoint.listing import all_checkpoints, step_of
from mmtrain.errors import RunStopped
from mmtrain.parallel.replicas import OddCopy


def not_finite(checkpoints: Path, step: int, what: str) -> RunStopped:
    """Return the end of a run whose numbers are not finite.

    Args:
        checkpoints: folder of the run's.
        step: the last one that was run.
        what: which numbers.
    """
    good = all_checkpoints(checkpoints)
    kept = f"{good[-1]} is the last good checkpoint" if good else "no checkpoint had been saved"
    return RunStopped(f"stopped after step {step:,}: {what}; nothing was saved of it, {kept}; lower the learning rate "
                      "or look at the rows of those steps in metrics.jsonl", RunStopped.NOT_FINITE)  # fmt: skip


def no_way_back(step: int, skipped: int, problem: str, option: str) -> RunStopped:
    """Return the end of a run whose steps were skipped too often, and that cannot go back.

    Args:
        step: the last one that was run.
        skipped: steps in a row.
        problem: why it cannot.
        option: of the guard or of checkpoints, that would let it.
    """
    return RunStopped(f"stopped after step {step:,}: the last {skipped} steps were skipped, and {problem}; lower the "
                      f"learning rate, look at the rows in ledger.jsonl, or change {option}",
                      RunStopped.NOT_FINITE)  # fmt: skip


def faulty_device(step: int, odd: Sequence[OddCopy]) -> RunStopped:
    """Return the end of a run in which ranks hold other bits of a parameter than those that share it."""
    named = "; ".join(f"rank {one.rank} on {one.host} has other bits in its copy of {one.name}" for one in odd)
    return RunStopped(f"stopped after step {step:,}: {named} than the ranks that share it: a fault of its device or "
                      "memory; nothing was saved of it; take that machine out and go on with run.resume=auto",
                      RunStopped.FAULTY_DEVICE)  # fmt: skip


def asked_for(checkpoints: Path, step: int, received: signal.Signals | None) -> RunStopped:
    """Return the end of a run that a signal asked for.

    Args:
        checkpoints: folder of the run's.
        step: the last one that was run.
        received: the signal; None if it came to another rank.
    """
    name, code = ("a signal to another rank", 143) if received is None else (received.name, 128 + received)
    found = all_checkpoints(checkpoints)
    newest = found[-1] if found else "none"
    is_new = bool(found) and step_of(found[-1]) == step
    what = f"saved {newest}" if is_new else f"nothing of it was saved, the newest checkpoint is {newest}"
    return RunStopped(f"stopped by {name} after step {step:,}, {what}; go on with run.resume=auto", code)
