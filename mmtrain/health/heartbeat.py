"""Heartbeat of all ranks, through the key-value store that the process group met in.

Every rank writes a count, its step and its state, and reads those of the ranks that it watches. A thread does both: a
call to a store whose host hangs never returns, whatever its timeout, so nobody else calls the store.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

RUNNING, LEFT, FAILED, LOST = "running", "left", "failed", "lost"


class Beat(NamedTuple):
    """One entry of a rank in the store.

    Attributes:
        count: differs from beat to beat.
        step: the step at work, from 1; None before the first.
        state: RUNNING, LEFT (it needs nobody and nobody needs it), FAILED (on an error) or LOST (others are missing).
        text: the error of state FAILED, the message of state LOST.
        stalled_at: where the rank's main thread stands, once it has been in its step for long; "" before.
    """

    count: int = 0
    step: int | None = None
    state: str = RUNNING
    text: str = ""
    stalled_at: str = ""


class Heartbeat:
    """Beats of this rank, written by a thread, and the last beats of the ranks that it watches.

    Attributes:
        interval: seconds between beats.
        own: what this rank says; :meth:`say` changes it.
        step: the step to say.
        stalled_at: the place to say; apart from `own`, which another thread sets.
        hosts: host name and process id of every rank.
        heard: the last beat of every rank that was ever watched.
        now: seconds on a clock that stands still while this process does (suspended, say), as it hears nobody then.
        gone: the store broke off.
    """

    def __init__(self, interval: float) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.interval = self._pause = interval
        self.own, self.step, self._count, self._written = Beat(), None, 0, RUNNING
        self.stalled_at = ""
        self.heard = dict.fromkeys(range(self.world), Beat())
        self.gone = False
        self.now = self._answered = 0.0
        self._when = [0.0] * self.world
        self._ticked = time.monotonic()
        self._watched: list[int] = []
        self._wake, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._exchange, daemon=True, name="heartbeat")

    def start(self, timeout: float) -> None:
        """Connect within `timeout` seconds, learn who the others are and begin to beat. Collective."""
        run = [uuid.uuid4().hex]  # a sweep, or a restart by torchrun, meets in the same store once more
        dist.broadcast_object_list(run, src=0, device=torch.device("cpu"))
        # A connection of its own: on the process group's, a call waits for that of another thread.
        connection = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                   wait_for_workers=False, timeout=timedelta(seconds=timeout))  # fmt: skip
        self._store = dist.PrefixStore(f"beats/{run[0]}", connection)
        self._write()
        self.hosts: list[tuple[str, int]] = [("", 0)] * self.world
        dist.all_gather_object(self.hosts, (socket.gethostname(), os.getpid()))  # from here on every key is there
        self._thread.start()

    def watch(self, ranks: list[int], pause: float) -> None:
        """Read the beats of these ranks every `pause` seconds; the silence of new ones counts from now."""
        for rank in set(ranks) - set(self._watched):
            self._when[rank] = self.now
        self._watched, self._pause = ranks, pause
        self._wake.set()

    def say(self, state: str, text: str, pause: float) -> None:
        """Change this rank's state, write it at once, and beat every `pause` seconds from now on."""
        self.own, self._pause = Beat(state=state, text=text), pause
        self._wake.set()

    def say_stalled(self, place: str) -> None:
        """Say at once where this rank's main thread stands; "" once it has moved on."""
        self.stalled_at = place
        self._wake.set()

    def wait(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait until `done` returns True or the store has broken off, for `seconds` at most."""
        end = time.monotonic() + seconds
        while not self.gone and time.monotonic() < end and not done():
            time.sleep(self.interval / 20)

    def said(self) -> bool:
        """Whether this rank's present state has been written."""
        return self._written == self.own.state

    def stop(self) -> None:
        """Stop beating; a thread that hangs in a call is left to itself."""
        self._stopped = True
        self._wake.set()
        self._thread.join(self.interval)

    def tick(self) -> None:
        """Move the clock on; one thread calls it, a few times an interval."""
        before, self._ticked = self._ticked, time.monotonic()
        self.now += min(self._ticked - before, self.interval)

    def silent(self, patience: float) -> list[int]:
        """Return the watched ranks that gave no sign for `patience` seconds and have not left."""
        return [rank for rank in self._watched if self.silence(rank) > patience and self.heard[rank].state != LEFT]

    def silence(self, rank: int) -> float:
        """Seconds since the last new beat of a watched rank."""
        return self.now - self._when[rank]

    def store_silence(self) -> float:
        """Seconds since the store last answered."""
        return self.now - self._answered

    def _exchange(self) -> None:
        try:
            while not self._stopped:
                watched = self._watched
                self._write()
                if self.rank != 0 and self._written != RUNNING:
                    return  # the last word; rank 0, which may host the store, ends once it has read it
                for rank, raw in zip(watched, self._store.multi_get([str(rank) for rank in watched]), strict=True):
                    beat = Beat(*json.loads(raw))
                    if beat != self.heard[rank]:
                        self.heard[rank], self._when[rank] = beat, self.now
                self._answered = self.now
                self._wake.wait(self._pause)
                self._wake.clear()
        except RuntimeError:  # as all errors of the store are
            self.gone = True

    def _write(self) -> None:
        self._count += 1
        beat = self.own._replace(count=self._count, step=self.step, stalled_at=self.stalled_at)
        self._store.set(str(self.rank), json.dumps(beat))
        self._written = beat.state
