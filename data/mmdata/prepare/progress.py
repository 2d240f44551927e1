"""How far the tokenization is, in bytes of text: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mmdata.prepare.shards import Task, bytes_seen, is_done

_FIRST_LINE_SECONDS = 10.0
_LINE_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_NEAR = 256  # shards looked at: those at work are among the first that are open, as they start in order


class Meter:
    """Bytes of text done over all shards, finished ones and those at work.

    Attributes:
        total: bytes of all shards.
        before: bytes that an earlier run left done.
    """

    def __init__(self, tasks: Sequence[Task], todo: Sequence[Task]) -> None:
        self.total = sum(task.weight for task in tasks)
        self._open = list(todo)
        self._finished = self.before = self.total - sum(task.weight for task in todo)

    def read(self) -> int:
        """Bytes done by now."""
        near, seen = self._open[:_NEAR], 0
        for task in near:
            if is_done(task):
                self._finished += task.weight
                self._open.remove(task)
            else:
                seen += bytes_seen(task)
        return self._finished + seen


@contextmanager
def show_progress(tasks: Sequence[Task], todo: Sequence[Task], log: Callable[[str], None]) -> Iterator[None]:
    """Show progress on stderr while the block runs: a bar in a terminal, else a line to `log` once it takes long."""
    done = threading.Event()
    follow = _follow_bar if sys.stderr.isatty() else _follow_lines
    thread = threading.Thread(target=follow, args=(Meter(tasks, todo), done, log), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def progress_line(before: int, now: int, total: int, seconds: float) -> str:
    """Line of progress: `before` bytes were there at the start, `now` are done after `seconds`."""
    rate = (now - before) / max(seconds, 1e-9)
    left = f", about {_time((total - now) / rate)} left" if rate > 0 else ""
    return f"tokenizing: {_size(now)} of {_size(total)}, {_size(rate)}/s{left}"


def _follow_lines(meter: Meter, done: threading.Event, log: Callable[[str], None]) -> None:
    if done.wait(_FIRST_LINE_SECONDS):  # short work says nothing
        return
    start = time.monotonic() - _FIRST_LINE_SECONDS
    while True:
        log(progress_line(meter.before, meter.read(), meter.total, time.monotonic() - start))
        if done.wait(_LINE_SECONDS):
            return


def _follow_bar(meter: Meter, done: threading.Event, log: Callable[[str], None]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        job = bar.add_task("tokenizing", total=meter.total, completed=meter.read())
        while not done.wait(_LOOK_SECONDS):
            bar.update(job, completed=meter.read())
        bar.update(job, completed=meter.read())


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
