#!/usr/bin/env python
"""Saving and loading of a checkpoint, beside torch's own ways and a plain copy of the same bytes on the same disk.

`torchrun --nproc-per-node N -m mmtrain.bench.checkpoint --model proxy_100m --out DIR`, on CPUs or GPUs. Figures are
those of the slowest rank and go to DIR/checkpoint.json as they come. Steps are of random tokens.

- *save*: as a run saves, through a copy on the host whose memory is there before, waited for. Plain copies of the same
  files are made in turns with saves, so that both find the disk in the same state; what was written before is removed,
  and the removal on the disk, before either begins. So are saves that hash nothing, for what hashing adds.
- *stall*: what a save holds the steps up by: its start, the wait before the next update, and giving it its name.
- *sum*: of the steps after its start without the stall, in percent of as many steps alone: the median of those right
  before and those right after.
- *resume*: from an empty model to the end of its first step; a process' start and imports are not in it.
- The page cache holds what was written, so loads and copies read from memory unless the bytes exceed it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash

from mmtrain.bench.plain_files import NoSum, copy_files, hash_tensors, read_files
from mmtrain.bench.saved_training import Figures, Training, parser_of, seconds
from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.checkpoint.manifest import file_sum, is_shard
from mmtrain.checkpoint.save import most_bytes
from mmtrain.checkpoint.staging import StagingBuffer
from mmtrain.config import ClusterConfig
from mmtrain.parallel import mesh


def save_unhashed(training: Training, folder: Path, copy: StagingBuffer) -> None:
    """Save, waited for, without hashing."""
    with mock.patch.object(xxhash, "xxh3_128", NoSum):
        training.begin(folder, copy).finish()


def ours_beside(training: Training, folder: Path, copy: StagingBuffer, count: int) -> dict[str, Any]:
    """Stall of a save beside the steps, and the steps after it began."""
    began = time.perf_counter()
    pending = training.begin(folder, copy)
    stall = time.perf_counter() - began
    took, waited = training.steps(count, pending)
    return {
        "stall_s": stall + waited,
        "steps_s": took,
        "step_s": statistics.median(took),
        "sum_s": sum(took),
        "write_s": pending.seconds,
    }


def dcp_beside(training: Training, folder: Path, count: int) -> dict[str, Any]:
    """The same of `dcp.async_save`, in a thread."""
    group = dist.new_group(backend="gloo")
    began = time.perf_counter()
    future = dcp.async_save(training.state(), checkpoint_id=folder, process_group=group)
    stall = time.perf_counter() - began
    took, _ = training.steps(count)
    future.result()
    return {"stall_s": stall, "step_s": statistics.median(took), "sum_s": sum(took)}


def between_steps_alone(training: Training, count: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `run` finds of steps beside a save, and their sum in percent of steps alone, before and after it."""
    before = sum(training.steps(count)[0])
    found = run()
    alone = [before, sum(training.steps(count)[0])]
    return {**found, "alone_sums_s": alone, "sum_percent": 100 * found["sum_s"] / statistics.median(alone)}


class Disk:
    """What measures on a disk share: a folder there, repeats, and where figures go.

    Attributes:
        keep: takes a figure's name and value.
    """

    def __init__(self, training: Training, out: Path, scratch: Path, repeats: int) -> None:
        self.training, self.scratch, self.repeats = training, scratch, repeats
        self.keep = Figures(training, out / "checkpoint.json").keep

    def clear(self, name: str) -> None:
        """Remove a folder; the disk has done it when this returns."""

        def remove() -> None:
            shutil.rmtree(self.scratch / name, ignore_errors=True)
            os.sync()

        on_main(remove)

    def timed(self, run: Callable[[], object]) -> list[float]:
        """Seconds of each of some calls."""
        return [seconds(run, self.training.context.device) for _ in range(self.repeats)]

    def in_turns(self, folder: str, *runs: Callable[[], object]) -> list[list[float]]:
        """Seconds of each of some calls, one after the other and all again; each finds the folder cleared."""
        took: list[list[float]] = [[] for _ in runs]
        for _ in range(self.repeats):
            for run, found in zip(runs, took, strict=True):
                self.clear(folder)
                found.append(seconds(run, self.training.context.device))
        return took

    def beside(self, name: str, count: int, run: Callable[[Path], dict[str, Any]], repeats: int) -> None:
        """Keep what steps beside saves into a folder show, next to steps alone."""
        for i in range(repeats):
            self.keep(f"{name}_{i}", between_steps_alone(self.training, count, lambda: run(self.scratch / "beside")))
            self.clear("beside")


def measure(disk: Disk, count: int, beside: int, peer: bool) -> None:
    """Measure all, and write it as it comes. The disk holds two copies of the state at a time.

    Args:
        disk: what is measured on.
        count: of steps that are timed, without a save and after one.
        beside: how many saves steps are timed after.
        peer: whether torch's own ways are measured too.
    """
    training, device, keep = disk.training, disk.training.context.device, disk.keep
    training.steps(3)
    keep("step_s", statistics.median(training.steps(count)[0]))
    copy = StagingBuffer(device)
    keep("reserve_s", seconds(lambda: copy.reserve(most_bytes(training.model.module)), device))
    measure_files(disk, copy)
    training.begin(disk.scratch / "beside", copy).finish()  # a plan for the new model
    disk.clear("beside")
    disk.beside("ours_beside", count, lambda folder: ours_beside(training, folder, copy, count), beside)
    copy.release()
    disk.clear("ours")
    if peer:
        measure_dcp(disk, count, beside)


def measure_files(disk: Disk, copy: StagingBuffer) -> None:
    """Measure saves, loads and a resume beside copying, hashing and reading the same bytes."""
    training, keep, device = disk.training, disk.keep, disk.training.context.device
    path, again = disk.scratch / "ours/step-00000001", disk.scratch / "again"
    keep("first_save_s", seconds(lambda: training.begin(path.parent, copy).finish(), device))
    files = [file for file in sorted(path.iterdir()) if is_shard(file.name)]
    mine = files[dist.get_rank() :: dist.get_world_size()]
    keep("bytes", sum(file.stat().st_size for file in files))
    copied, saved, unhashed = disk.in_turns(
        again.name, lambda: copy_files(mine, again), lambda: training.begin(again, copy).finish(),
        lambda: save_unhashed(training, again, copy),
    )  # fmt: skip
    disk.clear(again.name)
    keep("copy_s", copied)
    keep("ours_save_s", saved)
    keep("speed_of_a_copy", statistics.median(copied) / statistics.median(saved))
    hashed = seconds(lambda: hash_tensors(copy.tensors), device)
    keep("hash_s", hashed)
    keep("save_unhashed_s", unhashed)
    keep("hashing_adds", statistics.median(saved) / statistics.median(unhashed) - 1)
    keep("read_and_hash_s", seconds(lambda: [file_sum(file) for file in mine], device))
    keep("read_s", (read := disk.timed(lambda: read_files(mine))))

    def load() -> None:
        load_checkpoint(path, training.model.module, training.optimizer)

    def resume() -> None:
        training.build()
        load()
        training.step()

    keep("ours_load_s", disk.timed(load))
    keep("resume_s", (resumed := disk.timed(resume)))
    keep("resume_beyond_reading_s", statistics.median(resumed) - statistics.median(read))


def measure_dcp(disk: Disk, count: int, beside: int) -> None:
    """Measure torch's own ways."""
    training, folder = disk.training, disk.scratch / "dcp"
    disk.keep("dcp_save_s", disk.in_turns(folder.name, lambda: dcp.save(training.state(), checkpoint_id=folder))[0])

    disk.keep("dcp_load_s", disk.timed(lambda: training.load_state(folder)))
    disk.clear(folder.name)
    disk.beside("dcp_beside", count, lambda folder: dcp_beside(training, folder, count), beside)


def run(given: argparse.Namespace, tokens: int, measure: Callable[[Training, Path], None]) -> None:
    """Lay the processes of the launcher out, measure, and remove what was written.

    Args:
        given: options of :func:`parser_of`.
        tokens: of a rank's row.
        measure: is given the training and the folder to write to.
    """
    warnings.simplefilter("ignore")
    context = mesh.start(ClusterConfig(device=given.device))
    given.out.mkdir(parents=True, exist_ok=True)
    scratch = given.scratch or given.out / "scratch"
    try:
        measure(Training(context, given.model, tokens), scratch)
        on_main(lambda: shutil.rmtree(scratch))
    finally:
        mesh.stop()


def main() -> None:
    """Run on the processes of the launcher."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="of a rank's row")
    parser.add_argument("--steps", type=int, default=20, help="that are timed, without a save and after one")
    parser.add_argument("--beside", type=int, help="saves that steps are timed after; as many as repeats if not given")
    parser.add_argument("--alone", action="store_true", help="leave torch's own ways out")
    given = parser.parse_args()

    def measured(training: Training, scratch: Path) -> None:
        disk = Disk(training, given.out, scratch, given.repeats)
        measure(disk, given.steps, given.beside or given.repeats, not given.alone)

    run(given, given.tokens, measured)


if __name__ == "__main__":
    main()
