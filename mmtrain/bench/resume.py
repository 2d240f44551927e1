#!/usr/bin/env python
"""Seconds from the launch of a resumed run to its first step, beside reading the bytes of its checkpoint.

    python -m mmtrain.bench.resume launch/pretrain.py --out FOLDER [--processes 1] [--repeats 3] OPTION=VALUE ...

A run begins under torchrun and is stopped by SIGTERM, which saves it; then it is resumed and stopped as often as asked
for. torchrun's own start, imports, verification, loading, pinned memory and recorded CUDA graphs are all in it. The
run lies in FOLDER/run, the figures in FOLDER/resume.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmtrain.bench.plain_files import read_files
from mmtrain.checkpoint.listing import all_checkpoints
from mmtrain.errors import ConfigError
from mmtrain.log.metrics import read_metrics

OPTIONS = ("run.name=run", "run.resume=auto", "log.wandb=off", "checkpoint.keep=1")
_LOOK = 0.02  # seconds between two looks at the metrics
_LONGEST_SAVE = 300.0  # seconds
_VERIFIED = re.compile(r"^.*\bverified .* in ([0-9.]+) s$", re.MULTILINE)


def until_first_step(command: Sequence[str], run: Path, log: Path, longest: float) -> float:
    """Launch a run, stop it after its first step, and return the seconds from the launch to the end of that step.

    Args:
        command: what launches it.
        run: its folder.
        log: gets what it prints.
        longest: seconds to wait for the step.

    Raises:
        RuntimeError: it ended before, or took longer, with the end of what it printed.
    """
    before = _steps(run)
    with log.open("w") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while _steps(run) == before:
                if process.poll() is not None or time.perf_counter() - began > longest:
                    raise RuntimeError(f"no step after {longest:g} s: {log.read_text()[-3000:]}")
                time.sleep(_LOOK)
            return time.perf_counter() - began
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End a launch and, through it, its processes, which save first."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_LONGEST_SAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _steps(run: Path) -> int:
    try:
        return sum("loss" in record for record in read_metrics(run))
    except FileNotFoundError:
        return 0


def measure(
    launcher: Path, out: Path, processes: int, repeats: int, longest: float, options: Sequence[str]
) -> dict[str, Any]:
    """Launch a run, resume it `repeats` times, and return the figures, in seconds and bytes."""
    run = out / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(launcher), *options, f"run.dir={out}", *OPTIONS]  # fmt: skip
    new = until_first_step(command, run, out / "new.log", longest)
    resumed, verified, read = [], [], []
    for i in range(repeats):
        log = out / f"resumed-{i}.log"
        files = [path for path in all_checkpoints(run / "checkpoints")[-1].iterdir() if path.is_file()]
        began = time.perf_counter()
        read_files(files)
        read.append(time.perf_counter() - began)
        resumed.append(until_first_step(command, run, log, longest))
        verified += [float(seconds) for seconds in _VERIFIED.findall(log.read_text())]
        print(f"resumed {i + 1} of {repeats}: {resumed[-1]:.2f} s, reading {read[-1]:.2f}", flush=True)
    seconds = {"new_s": [new], "resumed_s": resumed, "read_s": read, "verified_s": verified,
               "beyond_reading_s": [whole - part for whole, part in zip(resumed, read, strict=True)]}  # fmt: skip
    return {
        "device": _device(),
        "torch": torch.__version__,
        "processes": processes,
        "options": list(options),
        "bytes": sum(path.stat().st_size for path in files),
        **{name: [round(one, 2) for one in found] for name, found in seconds.items()},
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the figures, and tell the medians.

    Raises:
        ConfigError: a number makes no sense, or the folder holds a run.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launcher", type=Path, help="the script that trains: launch/pretrain.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run and of the figures")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that a first step may take")
    parsed, options = parser.parse_known_args(arguments)
    for name, value in (("--processes", parsed.processes), ("--repeats", parsed.repeats)):
        if value < 1:
            raise ConfigError(name, value, "must be at least 1", "leave it out")
    if (parsed.out / "run").exists():
        raise ConfigError("--out", parsed.out, "holds a run", "give a new folder: a first launch is measured too")
    parsed.out.mkdir(parents=True, exist_ok=True)
    found = measure(parsed.launcher, parsed.out, parsed.processes, parsed.repeats, parsed.limit, options)
    (parsed.out / "resume.json").write_text(json.dumps(found, indent=1) + "\n")
    resumed, read = statistics.median(found["resumed_s"]), statistics.median(found["read_s"])
    print(f"resumed: {resumed:.2f} s from the launch to the end of its first step, {read:.2f} of them for reading "
          f"{found['bytes'] / 1e9:.3g} GB; figures in {parsed.out / 'resume.json'}")  # fmt: skip


if __name__ == "__main__":
    main()
