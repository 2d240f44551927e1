"""Processes that find what a rank imports already there: a server imports it once, and they are forked from it.

An import of torch and of the trainer takes six seconds of a core, more than most tests and most small runs.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
# Read when the server starts. The store of a process group looks up a name for every peer's address, 127.0.0.1 too, and
# would wait 5 s for a name server that does not answer.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}
IMPORTS = ["torch", "mmtrain.train.trainer", "mmtrain.checkpoint.run_folder", "mmtrain.config.cli", "hydra",
           "mmtrain.evals.needles", "mmtrain.train.plan_table", "mmtrain.health.watchdog"]  # fmt: skip
MEGATRON = "megatron.core.parallel_state"  # looks for GPUs when it is imported: none may be known before a fork
POLL_SECONDS = 0.02


@cache
def warm_processes() -> ForkServerContext:
    """What starts such processes; the first call starts the server, which ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS if torch.cuda.is_available() else [*IMPORTS, MEGATRON])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


def run_script(
    script: str, arguments: Sequence[str], environment: Mapping[str, str], processes: int | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script of this checkout as `python script` would, or on some ranks as torchrun would.

    Args:
        script: its path, relative to the checkout's root, which is the current folder of all ranks.
        arguments: its command line.
        environment: of all ranks, beside what a launcher gives each.
        processes: how many ranks; None for a process alone.
        timeout: seconds for all ranks together.

    Returns:
        What all ranks printed; the exit code of the first that failed, or 0. The others are stopped then.

    Raises:
        subprocess.TimeoutExpired: the ranks did not end in time; they are stopped.
    """
    store = None
    if processes is not None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in printed:
            path.touch()
        ranks = []
        for rank in range(processes or 1):
            given = {**environment, **ENVIRONMENT, **({} if store is None else _launched(rank, processes, store.port))}
            task = (script, list(arguments), given, *printed)
            ranks.append(warm_processes().Process(target=_run, args=task, name=f"{script} {rank}"))
            ranks[-1].start()
        try:
            code = _first_failure(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        out, err = (path.read_text(errors="replace") for path in printed)
    if code is None:
        raise subprocess.TimeoutExpired([script, *arguments], timeout, out, err)
    return subprocess.CompletedProcess([script, *arguments], code, out, err)


def _launched(rank: int, world: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _first_failure(ranks: list[multiprocessing.Process], deadline: float) -> int | None:
    """Wait for all ranks, or the first that fails, and return its exit code; 0 if none did, None at the deadline."""
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in ranks]
        if failed := [code for code in codes if code]:
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)
    return None


def _run(script: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """Become the script."""
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    folders = [str(ROOT / Path(script).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:0] = [folder for folder in folders if folder]
    runpy.run_path(script, run_name="__main__")
