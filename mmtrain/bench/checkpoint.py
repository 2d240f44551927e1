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
import gc
import json
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mmtrain.bench.context_step import packed_row
from mmtrain.bench.plain_files import NoSum, copy_files, hash_tensors, read_files
from mmtrain.bench.timing import slowest
from mmtrain.build import meta_model
from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.checkpoint.manifest import file_sum, is_shard
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.rank_writer import RankWriter
from mmtrain.checkpoint.save import BY_PARAMETER, PendingSave, begin_save, most_bytes
from mmtrain.checkpoint.staging import StagingBuffer
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig, PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.device import compute_dtype
from mmtrain.train.step import train_step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def options_of(model: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Return the options of a run with a model of configs/model."""
    return compose(["stage=quickstart", f"model={model}", "data.path=none", "run.name=bench", *overrides], CONFIGS)


class Training:
    """A model over all processes, under FSDP if no layout is given, its optimizer, and steps of it."""

    def __init__(
        self, context: mesh.ParallelContext, model: str, tokens: int, parallel: ParallelConfig | None = None
    ) -> None:
        self.context, self.config = context, options_of(model).model
        self.parallel = ParallelConfig() if parallel is None else parallel
        self.row = packed_row([tokens], self.config.vocab_size, context.rank)
        self.build()

    def build(self) -> None:
        """Begin anew: the first weights, and an optimizer without moments."""
        self.model = self.optimizer = None  # the memory of the ones before goes first
        dtype = compute_dtype("auto", self.context.device)
        self.model = apply_parallel(meta_model(self.config), self.context, self.parallel, dtype)
        self.model.initialise(0)
        self.optimizer = build_optimizer(self.model.module, OptimConfig())
        self.writer = RankWriter()

    def step(self, saving: PendingSave | None = None) -> float:
        """Train one step and return its seconds; the device has done it by then."""
        began = time.perf_counter()
        train_step(self.model, self.optimizer, [self.row], 1e-5, 1e4, clip_grad=1.0, saving=saving)
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def steps(self, count: int, saving: PendingSave | None = None) -> tuple[list[float], float]:
        """Train steps, beside a save if there is one, which gets its name between two of them as in a run.

        Returns their seconds without waits for the save, and the seconds of these waits.
        """
        took, waits, named = [], [0.0], saving is None

        def waited(call: Callable[[], object]) -> None:
            began = time.perf_counter()
            call()
            waits.append(time.perf_counter() - began)

        if saving is not None:
            let_go = saving.let_go
            saving.let_go = lambda: waited(let_go)
        for _ in range(count):
            before = sum(waits)
            took.append(self.step(saving) - (sum(waits) - before))
            (writing,) = slowest([float(saving is not None and saving.is_writing)], self.context.device)
            if saving is not None and not writing and not named:
                waited(saving.finish)
                named = True
        if saving is not None and not named:
            saving.finish()
        return took, sum(waits)

    def state(self) -> dict[str, Any]:
        """Weights and moments as torch's checkpoint takes them."""
        weights, moments = get_state_dict(self.model.module, self.optimizer, options=BY_PARAMETER)
        return {"model": weights, "optimizer": moments}

    def load_state(self, folder: Path) -> None:
        """Load it by `dcp.load`."""
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model.module, self.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"], options=BY_PARAMETER)  # fmt: skip

    def begin(self, folder: Path, copy: StagingBuffer | None) -> PendingSave:
        """Begin to save it our way."""
        return begin_save(folder, self.model.module, self.optimizer, Progress(1, 1), {"model": {}}, 1e4, copy=copy,
                          writer=self.writer)  # fmt: skip


class Figures:
    """Figures of a benchmark, on file and on the screen as they come; written by rank 0.

    Args:
        training: what they are of.
        path: a JSON file.
    """

    def __init__(self, training: Training, path: Path) -> None:
        config, device = training.config, training.context.device
        self._path = path
        self._found: dict[str, object] = {"model": config.name, "ranks": dist.get_world_size(), "device": str(device),
                                          "torch": torch.__version__}  # fmt: skip

    def keep(self, name: str, value: object) -> None:
        """Add one."""
        self._found[name] = value
        if dist.get_rank() == 0:
            print(f"{name}: {value}", flush=True)
            self._path.write_text(json.dumps(self._found, indent=1) + "\n")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call on the slowest rank, without the garbage of what went before, which takes 0.25 s of torch's."""
    gc.collect()
    dist.barrier()
    began = time.perf_counter()
    run()
    return slowest([time.perf_counter() - began], device)[0]


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


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that benchmarks of a disk share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proxy_100m", help="a model of configs/model")
    parser.add_argument("--repeats", type=int, default=3, help="of each figure")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--scratch", type=Path, help="folder of what is written, on the disk that is measured")
    parser.add_argument("--device", default="auto")
    return parser


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
