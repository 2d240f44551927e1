"""launch/pretrain.py with a rank that dies by SIGKILL at a moment within a run: `KILL=moment:count:rank`.

The moment is a call of a function, the count-th on that rank; it dies as the call begins, in its middle or at its end.
With `all` for the rank every rank dies there, as on a host that loses its power.
Under torchrun it dies in the first attempt only; with `KILL_LAUNCHER=too` torchrun dies with it, as a node does, and
with `KILL_LAUNCHER=alone` torchrun dies and the rank goes on, at a moment that is the beginning of a call.
"""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRETRAIN = str(Path(__file__).resolve().parents[2] / "launch/pretrain.py")


def die() -> None:
    launcher = os.environ.get("KILL_LAUNCHER")
    if launcher is not None:
        os.kill(os.getppid(), signal.SIGKILL)
    if launcher != "alone":
        os.kill(os.getpid(), signal.SIGKILL)


def before(call: Callable, *given: Any, **more: Any) -> None:
    die()


def after(call: Callable, *given: Any, **more: Any) -> None:
    call(*given, **more)
    die()


def half_written(call: Callable, path: Path, planned: list, tensors: Any, *more: Any) -> None:
    kept = list(tensors)
    call(path, planned, kept, *more)
    os.truncate(path, path.stat().st_size // 2)
    die()


def half_removed(call: Callable, path: Path, *given: Any, **more: Any) -> None:
    next(file for file in sorted(Path(path).iterdir()) if file.is_file()).unlink()
    die()


MOMENTS: dict[str, tuple[str, str, Callable]] = {
    "a step begins": ("mmtrain.train.trainer", "train_step", before),
    "a step ends": ("mmtrain.train.trainer", "train_step", after),
    "a save begins": ("mmtrain.train.saving", "begin_save", before),
    "a save has begun": ("mmtrain.train.saving", "begin_save", after),
    "a copy is taken": ("mmtrain.checkpoint.staging:StagingBuffer", "finish", before),
    "a file is half written": ("mmtrain.checkpoint.rank_writer", "write_tensors", half_written),
    "a file is written": ("mmtrain.checkpoint.rank_writer", "write_tensors", after),
    "an index is written": ("mmtrain.checkpoint.save", "write_index", after),
    "all have written": ("mmtrain.checkpoint.save:PendingSave", "finish", before),
    "a manifest is not written": ("mmtrain.checkpoint.save", "write_manifest", before),
    "a manifest is written": ("mmtrain.checkpoint.save", "write_manifest", after),
    "a checkpoint has its name": ("mmtrain.checkpoint.save", "_name", after),
    "an old one is half removed": ("mmtrain.checkpoint.listing:shutil", "rmtree", half_removed),
    "old ones are removed": ("mmtrain.train.saving", "remove_old", after),
}
"""Where: a module, and perhaps a class or module in it, and the name there; and how it dies."""
OF_MAIN = {"an index is written", "a manifest is not written", "a manifest is written", "a checkpoint has its name",
           "an old one is half removed", "old ones are removed"}  # fmt: skip
"""Moments that only the main process has."""
BOUNDARIES: dict[str, tuple[str, str, Callable]] = {
    "a boundary begins": ("mmtrain.train.trainer:Trainer", "_cross", before),
    "a boundary has its checkpoint": ("mmtrain.train.trainer:Trainer", "_change_session", before),
    "a layout is left": ("mmtrain.train.session:Session", "close", after),
    "the next layout is loaded": ("mmtrain.train.session:Session", "load", after),
    "a boundary ends": ("mmtrain.train.trainer:Trainer", "_cross", after),
}
"""Moments of a run whose phases have layouts of their own."""


def plant(moment: str, count: int) -> None:
    """Put the death into the function of a moment."""
    place, name, how = (MOMENTS | BOUNDARIES)[moment]
    module, _, inner = place.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, inner) if inner else owner
    call, left = getattr(owner, name), [count]

    def counted(*given: Any, **more: Any) -> Any:
        left[0] -= owner is not shutil or (Path(given[0]).name.startswith("step-") and Path(given[0]).exists())
        if left[0] == 0:
            how(call, *given, **more)
        return call(*given, **more)

    setattr(owner, name, counted)


if __name__ == "__main__":
    moment, count, rank = os.environ.pop("KILL").split(":")
    if rank in ("all", os.environ["RANK"]) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        plant(moment, int(count))
    sys.argv[0] = PRETRAIN
    runpy.run_path(PRETRAIN, run_name="__main__")
