"""Communication on streams of its own beside the one that computes, and how much of it computing hid.

Operations of one lane run one after another, in the order in which they are started. So that every rank starts those of
a process group in the same order, a group has one lane. On a CPU everything runs at once, in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Mark = torch.cuda.Event | float
"""A moment: on a stream of a GPU, or on the host's clock, in seconds."""


@dataclass(frozen=True)
class Pending:
    """Work that was started.

    Attributes:
        done: recorded after it; None where it is done already.
        holds: what must not be freed before: the work, with its tensors, and what it came after.
    """

    done: torch.cuda.Event | None
    holds: object = None


@dataclass
class Meter:
    """Times of communication, and of the computing stream's waits for it.

    Attributes:
        runs: begin and end of each operation.
        waits: begin and end of each wait.
    """

    runs: list[tuple[Mark, Mark]] = field(default_factory=list)
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)

    def read(self) -> tuple[float, float]:
        """Seconds of communication, and how many of them computing waited. Waits for the device."""
        return _seconds(self.runs), _seconds(self.waits)


class Lanes:
    """Streams for communication, one a name, and what is measured on them.

    Tensors that an operation reads or writes belong to the computing stream, on which they have to be allocated before
    it is started. They stay until its :class:`Pending` goes, which has to be waited for before.

    Attributes:
        aside: whether operations get streams of their own, or run in line with what is computed.
        meter: collects times while it is there.
    """

    def __init__(self, device: torch.device, aside: bool = True) -> None:
        self.device, self.aside = device, aside
        self.meter: Meter | None = None
        self._streams: dict[str, torch.cuda.Stream] = {}

    def run(self, lane: str, work: Callable[[], object], after: Pending | None = None) -> Pending:
        """Start an operation, once all that was computed so far, and `after`, are done."""
        if self.device.type == "cuda" and self.aside:
            return self._run_aside(self._stream(lane), work, after)
        if self.meter is None:
            work()
            return Pending(None)
        begin = self._mark()
        work()
        span = (begin, self._mark())
        self.meter.runs.append(span)
        self.meter.waits.append(span)
        return Pending(None)

    def _run_aside(self, stream: torch.cuda.Stream, work: Callable[[], object], after: Pending | None) -> Pending:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if after is not None and after.done is not None:
            stream.wait_event(after.done)
        with torch.cuda.stream(stream):
            begin = self._mark() if self.meter is not None else None
            work()
            done = self._mark()
        if self.meter is not None:
            self.meter.runs.append((begin, done))
        return Pending(done, (work, after))

    def wait(self, pending: Pending) -> None:
        """Let the computing stream go on when the operation is done."""
        if pending.done is None:
            return
        begin = self._mark() if self.meter is not None else None
        torch.cuda.current_stream(self.device).wait_event(pending.done)
        if self.meter is not None:
            self.meter.waits.append((begin, self._mark()))

    def read(self) -> tuple[float, float]:
        """Stop measuring; see :meth:`Meter.read`."""
        meter, self.meter = self.meter or Meter(), None
        return meter.read()

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=self.meter is not None)
        event.record()
        return event

    def _stream(self, lane: str) -> torch.cuda.Stream:
        if lane not in self._streams:
            # First of those that wait for a multiprocessor: the products that follow need what it brings.
            self._streams[lane] = torch.cuda.Stream(self.device, priority=-1)
        return self._streams[lane]


def _seconds(marks: list[tuple[Mark, Mark]]) -> float:
    return sum(_between(*pair) for pair in marks)


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
