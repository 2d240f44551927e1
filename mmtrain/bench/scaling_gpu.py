#!/usr/bin/env python
"""Weak scaling of a whole training step, from 1 GPU to several: tokens a second and MFU of launch/pretrain.py.

    python -m mmtrain.bench.scaling_gpu launch/pretrain.py --data CORPUS --gpus 4 --out FOLDER --layout "parallel.ep=4"

The model is as wide and deep as hybrid_1b, with 16 experts of 1,408 in place of each dense layer; rows of 8,192 tokens,
as many a GPU on one GPU as on all. Medians of the steps after the first three. As GPUs of one host differ by some
percent, all of them first train alone, at the same time: the efficiency of a layout is its speed over their mean.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmtrain.log.metrics import read_metrics

SEQ_LEN, STEPS, SKIPPED = 8192, 9, 3
MODEL = ["model=hybrid_1b", "model.num_experts=16", "model.ffn_hidden_size=1408"]
RUN = ["stage=quickstart", f"stage.phases.0.seq_len={SEQ_LEN}", "data.num_workers=0", "data.valid_rows=0",
       "log.wandb=off", "log.plot=false", "log.valid_interval=0", "checkpoint.save_final=false",
       "checkpoint.interval=0", "cluster.device=cuda", "stage.phases.0.lr.0.end=0.0003",
       "stage.phases.0.lr.1.start=0.0003", f"run.max_steps={STEPS}"]  # fmt: skip


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
