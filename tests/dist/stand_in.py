"""What a rank does in a run, as far as the other ranks see it, without the model; forked, so that torch loads once."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mmtrain.errors import RankLost
from mmtrain.health.watchdog import Watchdog
from mmtrain.parallel.expert.peer_buffers import PeerBuffers

MINUTES = 0.25  # the timeout; a rank is missing after half of it
STEP_SECONDS, WARM = 0.03, 120  # after so many steps a beat has told one


class StandIn:
    """A process that calls life(environment, log), with the part of Popen's interface that the tests use."""

    def __init__(self, environment: dict[str, str], log: Path, life: Callable[[dict[str, str], Path], None]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._process = context.Process(target=life, args=(environment, log), daemon=True)
        self._process.start()
        self.pid = self._process.pid
        self.kill = self._process.kill

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still there after {timeout} s"
        return self._process.exitcode


def hang() -> None:
    """Stand still as a rank does whose file system hangs."""
    time.sleep(1000)


def hold_interpreter() -> None:
    """Stand still without letting another thread run, as a library does that forgot to let go."""
    ctypes.PyDLL(None).sleep(1000)


def crash() -> None:
    """Read where there is no memory."""
    faulthandler.enable()
    ctypes.string_at(0)


def receive() -> None:
    """Call what no other rank calls."""
    dist.recv(torch.empty(1), src=0, tag=9)


FAULTS = {"hang": hang, "receive": receive, "hold": hold_interpreter, "crash": crash}


def serve(environment: dict[str, str], log: Path) -> None:
    """Keep the store, as torchrun does."""
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False)
    time.sleep(1000)
    del store  # it ends with its last name


def train(
    environment: dict[str, str],
    log: Path,
    steps: int = 1_000_000,
    stay: float = 0.0,
    device: str = "cpu",
    direct: bool = False,
    stuck: int = -1,
    how: str = "hang",
) -> None:
    """Reduce `steps` times, or read from each other; then the last rank needs nobody for `stay` seconds more.

    Rank `stuck` meets one of FAULTS at step WARM.
    """
    os.environ.update(environment)
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    timeout = timedelta(minutes=MINUTES)
    if device == "cpu":
        dist.init_process_group("gloo", timeout=timeout)
    else:
        here = torch.device("cuda", int(environment["LOCAL_RANK"]))
        torch.cuda.set_device(here)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=here)
    number = torch.ones(dist.get_world_size(), 1, device=device)
    buffers = PeerBuffers(dist.group.WORLD, number.device) if direct else None
    try:
        with Watchdog(MINUTES, log.parent / "stacks") as watchdog:
            for watchdog.step in range(1, steps + 1):
                if watchdog.step == WARM and dist.get_rank() == stuck:
                    FAULTS[how]()
                if buffers is None:
                    dist.all_reduce(number.fill_(1))
                else:
                    buffers.stage(*number.shape, number.dtype).fill_(watchdog.step)
                    buffers.read(number, used_M=torch.zeros_like(number[:, 0], dtype=torch.int32))
                number.tolist()  # on a GPU, the wait for it
                time.sleep(STEP_SECONDS)
                if watchdog.step == WARM:
                    os.write(1, b"warm\n")
            if dist.get_rank() == dist.get_world_size() - 1:
                time.sleep(stay)
    except RankLost as error:
        error.tell()
        sys.exit(RankLost.EXIT_CODE)
    finally:
        dist.destroy_process_group()
