#!/usr/bin/env python
"""Weak scaling of a whole training step, from 1 GPU to several: tokens a second and MFU of launch/pretrain.py.

    python -m mmtrain.bench.scaling_gpu launch/pretrain.py --data CORPUS --gpus 4 --out FOLDER --layout "parallel.ep=4"

The model is as wide and deep as hybrid_1b, with 16 experts of 1,408 in place of each dense layer; rows of 8,192 tokens,
as many a GPU on one GPU as on all, in micro-batches of the most rows that fit the memory of one GPU, alone and in every
layout. Medians of the steps after the first three. As GPUs of one host differ by some percent, all of them first train
alone, at the same time: the efficiency of a layout is its speed over their mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.log.metrics import read_metrics
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.memory.options import may_not_fit
from mmtrain.parallel.memory.predict import GIB, predict
from mmtrain.parallel.memory.workload import Workload

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

SEQ_LEN, STEPS, SKIPPED = 8192, 9, 3
MODEL = ["model=hybrid_1b", "model.num_experts=16", "model.ffn_hidden_size=1408"]
RUN = ["stage=quickstart", f"stage.phases.0.seq_len={SEQ_LEN}", "data.num_workers=0", "data.valid_rows=0",
       "log.wandb=off", "log.plot=false", "log.valid_interval=0", "checkpoint.save_final=false",
       "checkpoint.interval=0", "cluster.device=cuda", "stage.phases.0.lr.0.end=0.0003",
       "stage.phases.0.lr.1.start=0.0003", f"run.max_steps={STEPS}"]  # fmt: skip


def rows_that_fit(rows: int, layouts: Sequence[tuple[int, Sequence[str]]], device_bytes: float) -> int:
    """The most rows of a micro-batch, a divisor of those of a step, with which every layout fits its devices.

    Args:
        rows: of a GPU and step.
        layouts: numbers of GPUs with the overrides of a run on them.
        device_bytes: memory of a GPU.

    Raises:
        ConfigError: one row is too many, with the layout that does not take it.
    """
    for each in range(rows, 0, -1):
        if rows % each == 0 and not any(_too_large(*layout, rows, each, device_bytes) for layout in layouts):
            return each
    raise ConfigError("--rows", rows, f"not one row of {SEQ_LEN:,} tokens fits {device_bytes / GIB:.0f} GiB",
                      "add parallel.activation_checkpoint=block, or take GPUs with more memory")  # fmt: skip


def _too_large(gpus: int, overrides: Sequence[str], rows: int, each: int, device_bytes: float) -> bool:
    given = [*MODEL, *RUN, "data.path=none", "run.name=run", *overrides, f"parallel.micro_batch_rows={each}"]
    config = compose(given, CONFIGS)
    layout = plan_layout(gpus, config.parallel, config.model, [SEQ_LEN])
    ranks_of_a_row = layout.world // (layout.dp * layout.cp)  # pipelines and tensor parallelism share a GPU's rows
    work = Workload(config.model, config.parallel, layout, SEQ_LEN, rows * ranks_of_a_row // each, 2)
    return may_not_fit(predict(work), device_bytes, gpus)


def train(launcher: Path, data: Path, gpus: int, rows: int, overrides: list[str], first: int = 0) -> dict[str, Any]:
    """Medians of a run on `gpus` GPUs from number `first` on, with `rows` rows a GPU and step."""
    tokens = SEQ_LEN * rows * gpus
    batch = [f"stage.phases.0.tokens={tokens * (STEPS + 3)}", f"stage.phases.0.batch.0.tokens={tokens}",
             f"stage.phases.0.lr.0.tokens={tokens}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus),
                   str(launcher), *MODEL, *RUN, *batch, f"data.path={data}", f"run.dir={folder}", "run.name=run",
                   *overrides]  # fmt: skip
        visible = ",".join(_devices()[first : first + gpus])
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "CUDA_VISIBLE_DEVICES": visible})  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-3000:])
        steps = [record for record in read_metrics(Path(folder) / "run") if "loss" in record][SKIPPED:]
    notes = [line for line in done.stderr.splitlines() if line.startswith("token_groups=auto")]
    median = {key: statistics.median(step[key] for step in steps) for key in ("tokens_per_s", "mfu", "step_s")}
    hidden = steps[-1].get("exchange_hidden")
    return {"gpus": gpus, "overrides": overrides, "tokens_per_s_gpu": round(median["tokens_per_s"] / gpus, 1),
            "mfu": round(median["mfu"], 4), "step_s": round(median["step_s"], 4), "hidden": hidden,
            "exchange_s": steps[-1].get("exchange_s"), "drop_rate": steps[-1]["drop_rate"], "notes": notes}  # fmt: skip


def _devices() -> list[str]:
    """This machine's GPUs, or those of them that the environment names."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(gpu) for gpu in range(torch.cuda.device_count())]


def train_alone(launcher: Path, data: Path, gpus: int, rows: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Medians of every GPU that trains alone, all at the same time."""
    with ThreadPoolExecutor(gpus) as pool:
        return list(pool.map(lambda gpu: {"gpu": gpu, **train(launcher, data, 1, rows, overrides, gpu)}, range(gpus)))


def main() -> None:
    """Run every GPU alone, then every layout on all of them, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launcher", type=Path, help="the script that trains: launch/pretrain.py")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="rows a GPU and step")
    parser.add_argument(
        "--layout", action="append", default=[], help="overrides on all GPUs; several times for several"
    )
    parser.add_argument("--out", type=Path, required=True)
    options, common = parser.parse_known_args()
    if not any(override.startswith("parallel.micro_batch_rows=") for override in common):
        layouts = [(1, common), *((options.gpus, [*common, *layout.split()]) for layout in options.layout)]
        each = rows_that_fit(options.rows, layouts, torch.cuda.get_device_properties(0).total_memory)
        print(f"micro-batches of {each} rows, the most that fit", flush=True)
        common = [*common, f"parallel.micro_batch_rows={each}"]
    rows = train_alone(options.launcher, options.data, options.gpus, options.rows, common)
    for row in rows:
        print(json.dumps(row), flush=True)
    alone = statistics.mean(row["tokens_per_s_gpu"] for row in rows)
    for layout in options.layout:
        row = train(options.launcher, options.data, options.gpus, options.rows, [*common, *layout.split()])
        row["efficiency"] = round(row["tokens_per_s_gpu"] / alone, 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    device = f"{options.gpus} {torch.cuda.get_device_name()}, torch {torch.__version__}"
    record = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "model": MODEL,
        "seq_len": SEQ_LEN,
        "rows": rows,
    }
    (options.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
