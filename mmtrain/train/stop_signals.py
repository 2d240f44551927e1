"""Signals that ask a run to stop: remembered until the step at work is done, so that it can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: Slurm's usual warning before a time limit
SAME_REQUEST_SECONDS = 2.0  # in a terminal a Ctrl-C comes twice under torchrun: from the terminal and from torchrun


class StopSignals:
    """Context in which the first signal that asks for a stop is remembered, and a second one ends the process at once.

    Outside the main thread, where Python cannot take signals, nothing is changed.

    Attributes:
        received: the first signal, or None.

    Args:
        speaks: whether this process tells, on stderr, that it has understood.
    """

    def __init__(self, speaks: bool) -> None:
        self.received: signal.Signals | None = None
        self._speaks, self._since = speaks, 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            if self._speaks:  # straight to the descriptor: a signal may come in the middle of a print
                os.write(2, f"\n{self.received.name}: stopping after this step; once more ends at once\n".encode())
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
