"""Lock of a run folder: one launch at a time, on shared file systems too, and never for ever.

The lock is a file that appears whole or not at all (a hard link), since flock is not reliable on NFS. It names its
owner, and a thread of the owner touches it every few seconds. A launch that finds one decides whether the owner lives:
on the same machine by the process id and its start time, else by whether the file is touched, on the file system's own
clock, as those of two hosts may differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from mmtrain.checkpoint.lock_owner import Owner
from mmtrain.errors import ConfigError, UserError

FILE_NAME = ".lock"
BEAT_SECONDS, STALE_SECONDS = 15.0, 180.0  # between touches; a lock of another host that is older is taken over
GUARD_SECONDS = 10.0  # far longer than taking over takes


class LockLost(UserError):
    """Loss of a run folder's lock: another launch has taken this one for dead, and holds the folder now."""


class RunLock:
    """Context that holds a run folder for one process; nothing else may be written there without it.

    Args:
        folder: the run's folder; it is made, and removed again if nothing came to lie in it.
        note: is told, in a line, of a lock that was taken over or is being watched.
        patience: seconds to watch the lock of another host for; None is long enough to tell a dead owner.
        beat: seconds between touches.
        stale: seconds without a touch after which the owner on another host counts as dead.
    """

    def __init__(
        self,
        folder: Path,
        note: Callable[[str], None],
        patience: float | None = None,
        beat: float = BEAT_SECONDS,
        stale: float = STALE_SECONDS,
    ) -> None:
        self.path, self.owner, self._note = folder / FILE_NAME, Owner.this_process(), note
        self._patience, self._beat, self._stale = stale + beat if patience is None else patience, beat, stale
        self._lost, self._released = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True, name="run-lock")

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            ConfigError: another launch holds it, or the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._appear():
                self._displace_dead_owner()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()
            raise ConfigError("run.dir", self.path.parent.parent, f"cannot be written: {error.strerror} ({self.path})",
                              "make room or mend the rights there, or give another run.dir") from error  # fmt: skip
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join(self._beat)
        with contextlib.suppress(OSError):
            if _read(self.path) == self.owner:
                self.path.unlink()
            self.path.parent.rmdir()  # does nothing but in an empty folder

    def check(self) -> None:
        """Refuse to go on without the lock.

        Raises:
            LockLost: another launch has taken it over.
        """
        if self._lost.is_set():
            owner = _named(_read(self.path))
            raise LockLost(f"{self.path} was taken over by another launch ({owner}), which found this one silent for "
                           f"{self._stale:.0f} s; this one stops")  # fmt: skip

    def _appear(self) -> bool:
        """Let the lock appear, with its whole content; False if there is one."""
        scratch = self.path.with_name(f"{FILE_NAME}.{self.owner.launch}")
        text = json.dumps(dataclasses.asdict(self.owner)) + "\n"
        try:
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(scratch, self.path)
            except FileExistsError:
                return os.stat(scratch).st_nlink == 2  # NFS may lose the answer to a link that it made
            except OSError:  # a file system without hard links
                return self._create(text)
            return True
        finally:
            scratch.unlink(missing_ok=True)

    def _create(self, text: str) -> bool:
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        return True

    def _displace_dead_owner(self) -> None:
        """Remove the lock if its owner is dead; whoever does so holds a guard, so that it is this lock that goes.

        Raises:
            ConfigError: the owner lives.
        """
        owner, touched = _read(self.path), _touched(self.path)
        gone = owner.is_gone() if owner is not None else None
        if gone is None:
            gone = self._falls_silent(owner)
        if not gone:
            raise self._refusal(owner)
        guard = self.path.with_name(f"{FILE_NAME}.guard")
        try:
            guard.mkdir()
        except FileExistsError:  # another launch is at it, or was killed at it
            time.sleep(GUARD_SECONDS / 100)
            with contextlib.suppress(OSError):
                if self._now() - guard.stat().st_mtime > GUARD_SECONDS:
                    guard.rmdir()
            return
        try:
            if touched is not None and (_read(self.path), _touched(self.path)) == (owner, touched):
                self.path.unlink()
                self._note(f"took over the lock of a launch that is gone ({_named(owner)}): {self.path}")
        finally:
            guard.rmdir()

    def _refusal(self, owner: Owner | None) -> ConfigError:
        problem = f"another launch of this run is at work ({_named(owner)})"
        return ConfigError("run.name", self.path.parent.name, problem,
                           f"wait for it or stop it, or give another run.name; its lock is {self.path}")  # fmt: skip

    def _falls_silent(self, owner: Owner | None) -> bool:
        """Watch a lock whose owner cannot be seen from here: True once it is stale, False as soon as it is touched."""
        touched, end, told = _touched(self.path), time.monotonic() + self._patience, False
        while touched is not None:
            over = time.monotonic() > end  # before the look: a slow look must not be the reason to give up
            if (age := self._now() - touched) > self._stale:
                return True
            if over:
                return False
            if not told:
                self._note(f"{self.path} is held ({_named(owner)}) and was touched {max(age, 0):.0f} s ago: watching "
                           f"whether its owner lives, for {self._stale - age:.0f} s at most")  # fmt: skip
                told = True
            time.sleep(min(self._beat, self._stale) / 15)
            if (now := _touched(self.path)) != touched:
                return now is None or (_read(self.path) != owner and self._falls_silent(_read(self.path)))
        return True

    def _now(self) -> float:
        """The file system's clock."""
        probe = self.path.with_name(f"{FILE_NAME}.{self.owner.launch}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _touch(self) -> None:
        """Run as the thread: show that the owner lives, and notice that the lock has gone to another."""
        while not self._released.wait(self._beat):
            try:
                owner = _read(self.path)
                if owner == self.owner:
                    os.utime(self.path)
                elif owner is not None or not self._appear():  # one that was deleted by hand comes back
                    self._lost.set()
                    return
            except OSError:  # a file server that is away for a while
                continue


def _named(owner: Owner | None) -> str:
    return str(owner or "its lock does not say whose it is")


def _read(path: Path) -> Owner | None:
    """Read a lock; None where it is gone or garbage."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _touched(path: Path) -> float | None:
    """Return when a lock was touched last; opened for it, since NFS may answer for a closed file out of its cache."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
