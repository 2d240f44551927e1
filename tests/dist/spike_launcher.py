"""launch/pretrain.py on data of which some rows are poison: `POISON=first:end`, in rows of the first phase's stream.

With `LEAVE_OUT=first:end` rows are passed over by hand instead, and with `KILL` a rank dies (kill_launcher.py).
"""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from typing import Any

from mmdata.rows.loader import PackedBatch
from mmtrain.train.batches import BatchReader
from mmtrain.train.curriculum import RunStep
from tests.dist import kill_launcher

ROLLBACKS: dict[str, tuple[str, str, Any]] = {
    "a rollback begins": ("mmtrain.train.trainer", "choose_checkpoint", kill_launcher.before),
    "a rollback is on record": ("mmtrain.train.report:Report", "rollback", kill_launcher.after),
    "a rollback has set aside": ("mmtrain.checkpoint.run_folder:RunFolder", "set_aside_after", kill_launcher.after),
    "a rollback is done": ("mmtrain.train.report:Report", "rolled_back", kill_launcher.after),
    "a step after a rollback ends": ("mmtrain.train.trainer", "train_step", kill_launcher.after),
}


def rows(name: str) -> range:
    first, _, end = os.environ.pop(name, "0:0").partition(":")
    return range(int(first), int(end))


def poisoned(batch: PackedBatch) -> PackedBatch:
    """Labels that nothing learned so far points to."""
    return dataclasses.replace(batch, labels_BS=(batch.labels_BS + 128) % 257)


if __name__ == "__main__":
    poison, left_out, read = rows("POISON"), rows("LEAVE_OUT"), BatchReader.read

    def read_these(self: BatchReader, step: RunStep) -> list[PackedBatch]:
        if len(left_out) and step.first_row >= left_out.start:
            step = dataclasses.replace(step, first_row=step.first_row + len(left_out))
        batches = read(self, step)
        return [poisoned(batch) for batch in batches] if step.first_row in poison else batches

    BatchReader.read = read_these
    if "KILL" in os.environ:
        kill_launcher.MOMENTS.update(ROLLBACKS)
        moment, count, rank = os.environ.pop("KILL").split(":")
        if rank == os.environ["RANK"]:
            kill_launcher.plant(moment, int(count))
    sys.argv[0] = kill_launcher.PRETRAIN
    runpy.run_path(kill_launcher.PRETRAIN, run_name="__main__")
