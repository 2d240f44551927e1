"""The pool of processes that makes shards.

Processes, not the tokenizers package's own threads: on two cores two processes encode 1.6 times as fast as two
threads, which meet in the allocator (data/bench/bench_prepare.py measures it). They are spawned, not forked, because
the parent may hold threads (BPE training, the progress bar) that do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mmdata.corpus.writer import builder_class
from mmdata.errors import DataError
from mmdata.prepare.bpe import tokenizer_threads
from mmdata.prepare.progress import show_progress
from mmdata.prepare.shards import Task, is_done, make_shard, start_worker

_Task = TypeVar("_Task", bound=Task)


def run_shards(
    tasks: Sequence[_Task],
    workers: int,
    log: Callable[[str], None],
    make: Callable[[_Task], int] | None = None,
) -> None:
    """Make all shards that are not there yet, by `make`, a function of a module (default: `make_shard`, for text).

    Raises:
        DataError: a worker process died (most often for want of memory); finished shards stay.
    """
    made: Callable[[Any], int] = make or make_shard
    todo = [task for task in tasks if not is_done(task)]
    if len(todo) < len(tasks):
        log(f"going on from an earlier run: {len(tasks) - len(todo)} of {len(tasks)} shards are there")
    if not todo:
        return
    workers = min(workers, len(todo))
    with show_progress(tasks, todo, log):
        if workers > 1:
            _run_pool(todo, workers, made)
            return
        with tokenizer_threads(False):
            for task in todo:
                made(task)


def _run_pool(todo: Sequence[_Task], workers: int, make: Callable[[_Task], int]) -> None:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        futures: list[Future[int]] = [pool.submit(make, task) for task in todo]
        builder_class()  # seconds of import, needed by the merge: let it overlap the workers
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool:
        raise WorkerDied() from None
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerDied(DataError):
    """A worker process was killed. Unlike other DataErrors it leaves the finished shards for the next run."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was killed, most often for want of memory: "
            "run the same command again with a smaller --workers to go on"
        )
