"""A model whose state benchmarks save and load, its steps, and the figures that they find."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mmtrain.bench.context_step import packed_row
from mmtrain.bench.timing import slowest
from mmtrain.build import meta_model
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.rank_writer import RankWriter
from mmtrain.checkpoint.save import BY_PARAMETER, PendingSave, begin_save
from mmtrain.checkpoint.staging import StagingBuffer
from mmtrain.config import OptimConfig, ParallelConfig, PretrainConfig
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


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that benchmarks of a disk share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proxy_100m", help="a model of configs/model")
    parser.add_argument("--repeats", type=int, default=3, help="of each figure")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--scratch", type=Path, help="folder of what is written, on the disk that is measured")
    parser.add_argument("--device", default="auto")
    return parser
