"""Worker processes that are started once and run functions of many tests: importing torch costs more than most tests.

A function runs on the first `world` workers at once, each with the environment that torchrun would give it. It makes
and leaves its own process group (`mesh.start`, `mesh.stop`); a group it forgets is destroyed here.

Ranks meet in a store that is served from here, as torchrun's are in the launcher's. A port that is only looked up here,
and served by rank 0 later, may by then be another pool's on this machine: ranks would meet that pool's, and wait.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from mmtrain.parallel import mesh
from tests.dist.warm import warm_processes

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300.0  # the first call imports for ten seconds of a core, which is minutes where many share it
START_SECONDS = 300  # eight imports of torch on one busy core
DUMP_SECONDS = 5.0  # a worker that gets no time from its cores writes its stacks late
GRACE_SECONDS = 1.0  # after a failure: peers that fail in consequence answer at once, those that hang never do


class WorkerError(RuntimeError):
    """A function raised, died or hung on some rank; the text holds every traceback, the earliest first.

    Of ranks that hung it holds the stacks of all threads, where they stood when they were stopped.
    """


class Answer(NamedTuple):
    """What a worker sends for a task.

    Attributes:
        result: what the function returned.
        failure: traceback, or None.
        when: time of the failure, comparable between processes.
    """

    result: Any = None
    failure: str | None = None
    when: float = 0.0


@dataclass
class Worker:
    """A process.

    Attributes:
        process: it.
        pipe: this end of the pipe to it.
        stacks: file into which it writes the stacks of its threads when it is asked to.
    """

    process: BaseProcess
    pipe: Connection
    stacks: Path

    @property
    def core_seconds(self) -> float:
        """Seconds of its cores that the process has used; 0 once it is gone."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def receive(self) -> Answer:
        """The next answer; a failure if the process ended instead."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join()
            return Answer(failure=f"the process ended with exit code {self.process.exitcode}\n", when=time.time())

    def ask_for_stacks(self) -> None:
        """Let the process write where each of its threads stands, whatever it waits for; it goes on then."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR2)

    def read_stacks(self, deadline: float) -> str:
        """What the process wrote, once that has not grown for a moment, or at the deadline (`time.monotonic`)."""
        text, before = "", None
        while self.process.is_alive() and (not text or text != before) and time.monotonic() < deadline:
            time.sleep(0.1)
            text, before = self.stacks.read_text(errors="replace"), text
        return text or "it did not write its stacks\n"


class Pool:
    """Up to `size` workers; each starts when a task first needs it, and again after it was stopped."""

    def __init__(self, size: int) -> None:
        self._workers: list[Worker | None] = [None] * size
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")

    def run(self, function: Callable[..., Any], *args: Any, world: int = 4, timeout: float = SECONDS) -> list[Any]:
        """Call function(*args) on `world` workers at once and return their results in rank order.

        Args:
            function: of a module that workers can import. Results and arguments travel by value: pickle copies the
                storage of a tensor where multiprocessing's own pickler would pass a file descriptor.
            args: the same for every rank.
            world: number of ranks.
            timeout: seconds that the call may take, without the start of workers.

        Raises:
            WorkerError: a rank raised or died, or did not answer in time. Ranks that then do not answer are stopped.
        """
        task = pickle.dumps((function, args))
        answers, stacks = self._ask(self._start(world), task, timeout)
        failed = sorted((rank for rank in answers if answers[rank].failure), key=lambda rank: answers[rank].when)
        text = [f"rank {rank} of {world}: {answers[rank].failure}" for rank in failed]
        if len(answers) < world:
            silent = [rank for rank in range(world) if rank not in answers]
            after = f"{GRACE_SECONDS:g} s of the failure above" if failed else f"{timeout:g} s"
            text.append(f"no answer within {after} from ranks {silent} of {world}: stopped")
            text += [f"rank {rank} of {world} {stacks[rank]}" for rank in silent]
        if text:
            raise WorkerError("\n".join(text))
        return [answers[rank].result for rank in range(world)]

    def close(self) -> None:
        """Stop every worker."""
        self._stop(range(len(self._workers)))
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, world: int) -> list[Worker]:
        """The first `world` workers, all of them waiting for a task."""
        if world > len(self._workers):
            raise ValueError(f"world={world}: the pool has {len(self._workers)} workers")
        warm, fresh = warm_processes(), {}
        for rank, worker in enumerate(self._workers[:world]):
            if worker is None or not worker.process.is_alive():
                ours, theirs = warm.Pipe()
                stacks = Path(self._folder.name, str(rank))
                process = warm.Process(target=_work, args=(theirs, stacks), name=f"pool-{rank}", daemon=True)
                process.start()
                theirs.close()  # the worker's end lives in the worker alone, so its death ends the pipe
                self._workers[rank] = fresh[rank] = Worker(process, ours, stacks)
        for rank, worker in fresh.items():
            if not worker.pipe.poll(START_SECONDS) or worker.receive().failure:
                self._stop(fresh)
                raise WorkerError(f"worker {rank} did not start; {START_SECONDS} s are allowed")
        return self._workers[:world]

    def _ask(self, workers: list[Worker], task: bytes, timeout: float) -> tuple[dict[int, Answer], dict[int, str]]:
        """Send the task and return the answers by rank, and what is known of ranks without one.

        Workers without an answer are stopped, whatever ends the wait.
        """
        answers: dict[int, Answer] = {}
        pending = dict(enumerate(workers))
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a new one: no old addresses
        deadline = time.monotonic() + timeout
        used = {rank: worker.core_seconds for rank, worker in pending.items()}
        try:
            for rank, worker in pending.items():
                worker.pipe.send_bytes(pickle.dumps((rank, len(workers), store.port, task)))
            while pending and (left := deadline - time.monotonic()) > 0:
                ready = wait([worker.pipe for worker in pending.values()], left)
                for rank in [rank for rank, worker in pending.items() if worker.pipe in ready]:
                    answers[rank] = pending[rank].receive()
                    del pending[rank]
                    if answers[rank].failure:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            used = {rank: worker.core_seconds - used[rank] for rank, worker in pending.items()}
            stacks = {rank: f"used {used[rank]:.1f} s of a core, and stood at (innermost call first)\n{text}"
                      for rank, text in _stacks(pending).items()}  # fmt: skip  # few seconds tell of a wait in vain
        finally:
            self._stop(pending)
        return answers, stacks

    def _stop(self, ranks: Iterable[int]) -> None:
        """Kill the workers of these ranks."""
        for rank in ranks:
            if (worker := self._workers[rank]) is not None:
                worker.process.kill()
                worker.process.join()
                worker.pipe.close()
                self._workers[rank] = None


def _stacks(workers: dict[int, Worker]) -> dict[int, str]:
    """Where the threads of these workers stand, by rank, all at about the same time."""
    for worker in workers.values():
        worker.ask_for_stacks()
    deadline = time.monotonic() + DUMP_SECONDS
    return {rank: worker.read_stacks(deadline) for rank, worker in workers.items()}


def _work(pipe: Connection, stacks: Path) -> None:
    """A worker's life: announce itself, then answer tasks until it is killed or the pipe ends.

    Args:
        pipe: brings tasks and takes answers.
        stacks: file to write the stacks of all threads to, on SIGUSR2.
    """
    file = stacks.open("w")  # as long as the process lives; written without the interpreter, which may be waiting
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    torch.set_num_threads(1)
    for folder in (ROOT / "data", ROOT / "kernels", ROOT):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    gc.freeze()  # what was imported stays: to look through it took half a second after every task
    pipe.send_bytes(pickle.dumps(Answer()))
    while True:
        try:
            rank, world, port, task = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the parent is gone
            return
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                          TORCHELASTIC_USE_AGENT_STORE="True")  # fmt: skip  # the parent serves it
        try:
            function, args = pickle.loads(task)
            result = function(*args)
            _leave_group()
            answer = pickle.dumps(Answer(result))
        except BaseException:  # SystemExit too: the parent must learn of it
            answer = pickle.dumps(Answer(failure=traceback.format_exc(), when=time.time()))
        pipe.send_bytes(answer)
        _leave_group()  # after a failure; its traceback was sent first, because leaving may hang


def _leave_group() -> None:
    """Leave nothing to the next task: no group, no mesh of one in DTensor's caches, no model that knows one."""
    mesh.stop()
    gc.collect()  # modules under FSDP refer to each other; each gloo thread that lives wakes a hundred times a second


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
