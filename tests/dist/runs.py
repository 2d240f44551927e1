"""Real runs of launch/pretrain.py in other processes, on a corpus made for the test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.dist.warm import ROOT, run_script

SMALL = [
    "model.num_layers=2", "model.layer_pattern=LS", "model.hidden_size=32", "model.num_heads=2",
    "model.num_kv_heads=1", "model.head_dim=16", "model.rotary_dim=8", "model.num_experts=4",
    "model.ffn_hidden_size=24", "model.vocab_size=257", "model.loss_chunk_tokens=64", "stage=quickstart",
    "stage.phases.0.seq_len=64", "stage.phases.0.tokens=4096", "stage.phases.0.batch.0.tokens=512",
    "stage.phases.0.lr.0.tokens=512", "stage.phases.0.lr.0.end=0.01", "stage.phases.0.lr.1.start=0.01",
    "data.num_workers=0", "data.valid_rows=3", "log.wandb=off", "log.plot=false", "optim.precision=fp32",
    "cluster.device=cpu",
]  # fmt: skip


def make_corpus(folder: Path, documents: int = 60) -> Path:
    """Byte-tokenized documents of 1 to 300 pseudo-random but compressible letters, with a held-out part."""
    text = folder / "text"
    text.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    for i in range(documents):
        size = int(rng.integers(1, 300))
        (text / f"{i:03d}.txt").write_text(" ".join(rng.choice(words, size=size))[:size])
    out = folder / "corpus"
    subprocess.run(
        [sys.executable, "launch/prepare.py", "--input", str(text), "--output", str(out), "--tokenizer", "bytes",
         "--valid-fraction", "0.1", "--workers", "1"],
        cwd=ROOT, env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    return out


def pretrain(*overrides: str, processes: int | None = 1, check: bool = True) -> subprocess.CompletedProcess:
    """Run launch/pretrain.py: alone for None, on as many ranks for a number.

    Where a failure is looked at (`check=False`), several ranks are torchrun's; all others are forked, warm.
    """
    if processes is None or check:
        done = run_script("launch/pretrain.py", overrides, environment(), processes, timeout=300)
    else:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
             "launch/pretrain.py", *overrides],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    if check and (done.returncode != 0 or "is missing" in done.stderr):  # no rank of a whole run is missed
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def kill_launch(launcher: subprocess.Popen) -> None:
    """Kill torchrun and its ranks at one moment; each rank is the leader of a session of its own."""
    tree, new = [], [launcher.pid]
    while new:
        tree += new
        new = [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _parent(stat) in new]
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


def _parent(stat: Path) -> int | None:
    """Read the parent's id out of a process's entry in /proc; None if it has ended since."""
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def steps(run: Path) -> list[dict]:
    """The records of a run's optimizer steps."""
    return [record for record in records(run) if "loss" in record]


def records(run: Path) -> list[dict]:
    """All records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def environment() -> dict[str, str]:
    """For a child process that imports from this checkout and computes on one thread."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "data"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
