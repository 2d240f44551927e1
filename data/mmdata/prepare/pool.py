"""The pool of processes that makes shards, with a progress bar.

Processes, not the tokenizers package's own threads: on two cores two processes encode 1.6 times as fast as two
threads, which meet in the allocator (data/bench/bench_prepare.py measures it). They are spawned, not forked, because
the parent may hold threads (BPE training, the progress bar) that do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from mmdata.corpus.writer import builder_class
from mmdata.errors import DataError
from mmdata.prepare.bpe import tokenizer_threads
from mmdata.prepare.shards import ShardTask, is_done, make_shard, start_worker


def run_shards(tasks: Sequence[ShardTask], workers: int, log: Callable[[str], None]) -> None:
    """Make all shards that are not there yet.

    Raises:
        DataError: a worker process died (most often for want of memory); finished shards stay.
    """
    todo = [task for task in tasks if not is_done(task)]
    if len(todo) < len(tasks):
        log(f"going on from an earlier run: {len(tasks) - len(todo)} of {len(tasks)} shards are there")
    done_bytes = sum(_weight(task) for task in tasks) - sum(_weight(task) for task in todo)
    workers = min(workers, len(todo))
    with _progress(sum(_weight(task) for task in tasks), done_bytes) as advance:
        if workers > 1:
            _run_pool(todo, workers, advance)
            return
        with tokenizer_threads(False):
            for task in todo:
                advance(make_shard(task))


def _run_pool(todo: Sequence[ShardTask], workers: int, advance: Callable[[int], None]) -> None:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        futures: list[Future[int]] = [pool.submit(make_shard, task) for task in todo]
        for future in futures:
            future.add_done_callback(lambda done: _report(done, advance))
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


class WorkerDied(DataError):
    """A worker process was killed. Unlike other DataErrors it leaves the finished shards for the next run."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was killed, most often for want of memory: "
            "run the same command again with a smaller --workers to go on"
        )


def _report(done: Future[int], advance: Callable[[int], None]) -> None:
    if not done.cancelled() and done.exception() is None:
        advance(done.result())


def _weight(task: ShardTask) -> int:
    return sum(piece.weight for piece in task.pieces)


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on stderr; nothing at all where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda weight: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        job = bar.add_task("tokenizing", total=total, completed=done)
        yield lambda weight: bar.advance(job, weight)
