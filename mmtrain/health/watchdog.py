"""A rank that dies, hangs or stops on an error is named by all other ranks, which then stop instead of waiting for it.

Rank 0 watches the beats of all ranks; the others watch rank 0's, which carries its verdict, so that the store serves
two keys a rank however many there are. When a collective fails, every rank looks for the cause itself.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from mmtrain.errors import RankLost, RunStopped, brief
from mmtrain.health.heartbeat import FAILED, LEFT, LOST, RUNNING, Heartbeat
from mmtrain.health.stalls import Stall

INTERVAL_SECONDS, INTERVALS_PER_TIMEOUT = 2.0, 12  # between beats: the first, or less where the timeout is short
# Of the timeout: so long a rank may be silent. NCCL's watchdog ends a process, without a word on who is missing, one
# timeout after a collective began, and the others may have waited in it for a while before the rank died.
SILENT_SHARE = 0.5
GRACE_BEATS = 3  # after a collective has failed, a rank that misses so many is taken for the cause
UNWIND_SECONDS = 30.0  # from RankLost to the end of the process: leaving NCCL's groups may hang too
NAMED = 8  # missing ranks that a message describes


class Watchdog:
    """Context within the process group's life that ends this rank when another is missing; entering it is collective.

    While this rank waits for others that are missing, a thread says so and ends the process with exit code 3. An error
    of a collective that fails because of them leaves the context as :class:`RankLost`; any other goes on unchanged.
    A rank that leaves the context has said goodbye and is not missed. A process on its own is not watched.
    """

    def __init__(self, timeout_minutes: float, folder: Path | None = None) -> None:
        """Prepare a watch over all other ranks.

        Args:
            timeout_minutes: timeout of the process group's collectives.
            folder: where each rank's stacks go when a step takes half of that, or a rank is lost; None: nowhere.
        """
        self._timeout = 60 * timeout_minutes
        self._heartbeat = Heartbeat(min(INTERVAL_SECONDS, self._timeout / INTERVALS_PER_TIMEOUT))
        self._others = [rank for rank in range(self._heartbeat.world) if rank != self._heartbeat.rank]
        self._stop, self._judging = threading.Event(), threading.Lock()
        self._unwinding = False
        self._stall = Stall(self._heartbeat, SILENT_SHARE * self._timeout, folder)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    @property
    def step(self) -> int | None:
        """The step at work, from 1, which the others name if this rank gets lost; the training loop sets it."""
        return self._heartbeat.step

    @step.setter
    def step(self, step: int) -> None:
        self._heartbeat.step = step

    def __enter__(self) -> Self:
        if self._others:
            self._heartbeat.watch(self._others if self._heartbeat.rank == 0 else [0], self._heartbeat.interval)
            self._heartbeat.start(self._timeout)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._others:
            return
        if isinstance(error, RunStopped):
            error = None  # all ranks leave alike: nobody is lost
        lost = None
        if error is not None:
            with self._judging:  # the watching thread may be about to end the process: it alone speaks then
                self._unwinding = True
            lost = self._cause() if isinstance(error, RuntimeError) else None  # as all errors of collectives are
        if lost is not None:
            self._stall.dump()
            self._leave(LOST, str(lost), at_once=True)
            end = threading.Timer(UNWIND_SECONDS, self._end, [lost])
            end.daemon = True
            end.start()
            raise lost from error
        failed = isinstance(error, Exception)  # KeyboardInterrupt and SystemExit are no failure of this rank
        self._leave(FAILED if failed else LEFT, brief(error) if failed else "", at_once=error is not None)

    def _watch(self) -> None:
        """Run as the thread: end the process when a rank is missing, whatever the main thread hangs in."""
        while not self._stop.wait(self._heartbeat.interval / 4):
            self._heartbeat.tick()
            self._stall.look()
            with self._judging:
                if not self._unwinding and (lost := self._lost(SILENT_SHARE * self._timeout)) is not None:
                    self._end(lost)

    def _end(self, lost: RankLost) -> None:
        try:
            self._stall.dump()
            lost.tell()
            self._heartbeat.say(LOST, str(lost), self._heartbeat.interval)
            time.sleep(2 * self._heartbeat.interval)  # for the others to read it: the store may live in this process
            sys.stdout.flush()
        finally:  # a closed stderr, say, must not keep the process
            os._exit(RankLost.EXIT_CODE)

    def _leave(self, state: str, text: str, at_once: bool) -> None:
        """Say goodbye, and stop; rank 0, where the store may live, first hears the goodbyes of the others."""
        heartbeat = self._heartbeat
        heartbeat.say(state, text, pause=heartbeat.interval / 20)
        heartbeat.wait(heartbeat.said, 2 * heartbeat.interval)
        if heartbeat.rank == 0:
            # After an error here the others may hang in a collective: they get the time to read of it, no more.
            patience = GRACE_BEATS * heartbeat.interval if at_once else self._timeout
            heartbeat.wait(lambda: all(heartbeat.heard[rank].state != RUNNING for rank in self._others), patience)
        self._stop.set()
        self._thread.join(heartbeat.interval)
        heartbeat.stop()

    def _cause(self) -> RankLost | None:
        """Find the rank that caused an error here; None if all other ranks beat on."""
        heartbeat = self._heartbeat
        heartbeat.watch(self._others, pause=heartbeat.interval / 4)
        end = heartbeat.now + (GRACE_BEATS + 1) * heartbeat.interval
        while heartbeat.now < end and self._thread.is_alive():
            if (lost := self._lost(GRACE_BEATS * heartbeat.interval)) is not None:
                return lost
            time.sleep(heartbeat.interval / 20)
        return self._stall.verdict()

    def _lost(self, patience: float) -> RankLost | None:
        """Return another rank's verdict, else one on ranks that are silent for `patience` seconds, else None."""
        heartbeat = self._heartbeat
        if verdict := next((beat.text for beat in heartbeat.heard.values() if beat.state == LOST), None):
            return RankLost(verdict)
        if heartbeat.own.state != RUNNING and heartbeat.rank != 0:
            return None  # it has left; only rank 0 stays for others then
        if heartbeat.gone or heartbeat.store_silence() > patience:
            return self._message([0], store=True) if heartbeat.heard[0].state != LEFT else None
        if heartbeat.store_silence() > 2 * heartbeat.interval:
            return None  # no rank's news comes through, which says nothing of the ranks
        silent = heartbeat.silent(patience)
        return self._message(silent) if silent else None

    def _message(self, ranks: list[int], store: bool = False) -> RankLost:
        said = "; ".join(self._describe(rank, store) for rank in ranks[:NAMED])
        more = f"; and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
        return RankLost(f"{said}{more}; see that rank's log for the cause, then go on with run.resume=auto")

    def _describe(self, rank: int, store: bool) -> str:
        (host, pid), beat = self._heartbeat.hosts[rank], self._heartbeat.heard[rank]
        step = "before its first step" if beat.step is None else f"in step {beat.step}"
        who = f"rank {rank} of {self._heartbeat.world} (pid {pid} on {host})"
        if beat.state == FAILED:
            return f"{who} stopped {step} on {beat.text}"
        if not store:
            return f"{who} is missing: no sign of life for {self._heartbeat.silence(rank):.0f} s, last seen {step}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, on the first node
            return f"torchrun of {who} or its node is missing: the store it keeps does not answer"
        return f"{who} is missing: the store it keeps does not answer, last seen {step}"
