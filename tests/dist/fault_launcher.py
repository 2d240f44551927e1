"""launch/pretrain.py with a fault on one rank: `NAN=step:rank`, a weight that is none, after so many steps;
`RAISE=step:rank`, an error of ours; `CRASH=step:rank`, a read where there is no memory; or `STALL=seconds:rank`, a file
system that takes so long to bring a file to the disk, once a first checkpoint is there.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmtrain.checkpoint.listing import all_checkpoints
from mmtrain.config.process_env import read_processes
from mmtrain.train import trainer
from tests.dist.kill_launcher import PRETRAIN

FOLDER = next(given.split("=", 1)[1] for given in sys.argv if given.startswith("run.dir="))


def with_nan(step: float) -> None:
    train_step, done = trainer.train_step, []

    def poisoned(model: Any, *given: Any, **more: Any) -> Any:
        result = train_step(model, *given, **more)
        done.append(result)
        if len(done) == step:
            local = next(p.to_local() for p in model.module.parameters() if p.to_local().numel())
            with torch.no_grad():
                local.view(-1)[0] = torch.nan
        return result

    trainer.train_step = poisoned


def before_step(number: float, fault: Callable[[], None]) -> None:
    train_step, begun = trainer.train_step, []

    def faulty(*given: Any, **more: Any) -> Any:
        begun.append(1)
        if len(begun) == number:
            fault()
        return train_step(*given, **more)

    trainer.train_step = faulty


def raise_error() -> None:
    raise AssertionError("not as it should be")


def crash() -> None:
    ctypes.string_at(0)


def with_stall(seconds: float) -> None:
    sync = os.fsync

    def slow(handle: int) -> None:
        if all_checkpoints(Path(FOLDER) / "r/checkpoints"):
            time.sleep(seconds)
        sync(handle)

    os.fsync = slow


if __name__ == "__main__":
    for name, fault in (
        ("NAN", with_nan),
        ("STALL", with_stall),
        ("RAISE", partial(before_step, fault=raise_error)),
        ("CRASH", partial(before_step, fault=crash)),
    ):
        value, _, rank = os.environ.pop(name, "0:-1").partition(":")
        if read_processes().rank == int(rank):
            fault(float(value))
    sys.argv[0] = PRETRAIN
    runpy.run_path(PRETRAIN, run_name="__main__")
