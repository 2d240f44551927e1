"""`BuildLock`: the right of one process, on whatever host, to work out an entry of a cache that all of them wait for.

The lock is a file made with O_EXCL, which network file systems honour too. Its holder rewrites it every few seconds, so
a file that no longer changes is a dead holder's, and is taken away. The lock only saves work, it guards nothing: two
builders of one entry make the same entry, and the rename that publishes it lets the first win.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

BEAT = 5.0  # seconds between two signs of life of a holder
STALE = 120.0  # seconds without one after which a holder counts as dead; network file systems show changes late
POLL = 2.0  # seconds between two looks of a process that waits, once it has waited for a while
TELL = 10.0  # seconds between two lines about waiting


class BuildLock:
    """Lock file of this process; a context manager that gives it back. Made by :func:`take_lock`.

    Attributes:
        path: the file.
        done: share of the work that is done, 0 to 1, which the holder sets and waiting processes tell.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, 0.0
        self._who = {"host": host_name(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> BuildLock:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if (read_holder(self.path) or {}).get("token") in (None, self._who["token"]):  # not one that replaced ours
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(BEAT):
            beats += 1
            with contextlib.suppress(OSError):
                self._write(beats)

    def _write(self, beats: int = 0) -> None:
        text = json.dumps({**self._who, "beats": beats, "done": round(self.done, 3)})
        self.path.write_text(text, encoding="utf-8")


def take_lock(path: Path) -> BuildLock | None:
    """Make the lock file, or return None where another process holds it.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return None
    return BuildLock(path)


def wait_for_lock(path: Path, ready: Callable[[], bool], what: str, log: Callable[[str], None]) -> None:
    """Wait until `ready()`, or until the lock is gone or, being a dead holder's, has been taken away.

    Args:
        path: the lock file.
        ready: whether the entry is there.
        what: name of the entry in messages.
        log: gets a line at times.
    """
    seen, changed = b"", time.monotonic()
    told, pause = changed, POLL / 40
    while not ready():
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        now = time.monotonic()
        if content != seen:
            seen, changed = content, now
        holder = read_holder(path)
        if now - changed > STALE or _is_dead(holder):
            log(f"{what}: its builder, {_name(holder)}, is gone; the index is built anew")
            _take_away(path)
            return
        if now - told > TELL:
            told = now
            done = float((holder or {}).get("done", 0))
            log(f"waiting for {what}, which {_name(holder)} builds{f': {done:.0%} done' if done else ''}")
        time.sleep(pause)
        pause = min(POLL, 1.5 * pause)  # thousands of processes may be waiting


def read_holder(path: Path) -> dict[str, Any] | None:
    """Record in a lock file: host, pid, share done; None where it cannot be read (it may be half written)."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None


def host_name() -> str:
    """Name of the machine and of the space that process ids are numbered in (each container has one of its own)."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def _is_dead(holder: dict[str, Any] | None) -> bool:
    """Whether the holder was a process of this machine that no longer runs."""
    if holder is None or holder.get("host") != host_name():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def _name(holder: dict[str, Any] | None) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {str(holder.get('host', '?')).split()[0]}"


def _take_away(path: Path) -> None:
    """Remove a lock file by way of a rename, which only one of those that try can do."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)
        aside.unlink(missing_ok=True)
