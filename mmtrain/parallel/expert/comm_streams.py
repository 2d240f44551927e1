"""Communication on CUDA streams of its own beside the one that computes, and how much of it computing hid.

Operations of one stream run one after another, in the order in which they are started. So that every rank starts those
of a process group in the same order, a group has one stream. On a CPU everything runs at once, in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

Timestamp = torch.cuda.Event | float
"""A moment: on a stream of a GPU, or on the host's clock, in seconds."""


@dataclass(frozen=True)
class Work:
    """Handle of an operation that was started.

    Attributes:
        done: recorded after it; None where it is done already.
        keep_alive: objects not to be freed before: the operation, with its tensors, and the work it came after.
    """

    done: torch.cuda.Event | None
    keep_alive: object = None


class CommTimes(NamedTuple):
    """Time that communication took.

    Attributes:
        seconds: of all operations.
        waited_seconds: how many of them computing waited, for nothing hid them.
    """

    seconds: float
    waited_seconds: float


@dataclass
class CommTimer:
    """Times of communication, and of the computing stream's waits for it.

    Attributes:
        operations: begin and end of each.
        waits: begin and end of each.
    """

    operations: list[tuple[Timestamp, Timestamp]] = field(default_factory=list)
    waits: list[tuple[Timestamp, Timestamp]] = field(default_factory=list)

    def read(self) -> CommTimes:
        """Add up the times. Waits for the device."""
        return CommTimes(_seconds(self.operations), _seconds(self.waits))


class CommStreams:
    """Streams for communication, one a name, and a timer for what runs on them.

    Tensors that an operation reads or writes belong to the computing stream, on which they have to be allocated before
    it is started. They stay until its :class:`Work` goes, which has to be waited for before.

    Attributes:
        asynchronous: whether operations get streams of their own, or run in line with what is computed.
    """

    def __init__(self, device: torch.device, asynchronous: bool = True) -> None:
        self.device, self.asynchronous = device, asynchronous
        self._timer: CommTimer | None = None
        self._streams: dict[str, torch.cuda.Stream] = {}

    def run(self, stream: str, operation: Callable[[], object], after: Work | None = None) -> Work:
        """Start an operation, once all that was computed so far, and `after`, are done."""
        if self.device.type == "cuda" and self.asynchronous:
            return self._run_asynchronously(self._stream(stream), operation, after)
        if self._timer is None:
            operation()
            return Work(None)
        begin = self._timestamp()
        operation()
        span = (begin, self._timestamp())
        self._timer.operations.append(span)
        self._timer.waits.append(span)
        return Work(None)

    def wait(self, work: Work) -> None:
        """Let the computing stream go on when the operation is done."""
        if work.done is None:
            return
        begin = self._timestamp() if self._timer is not None else None
        torch.cuda.current_stream(self.device).wait_event(work.done)
        if self._timer is not None:
            self._timer.waits.append((begin, self._timestamp()))

    def start_timing(self) -> None:
        """Time operations from now on, from zero."""
        self._timer = CommTimer()

    def read_times(self) -> CommTimes:
        """Stop timing, and add up what was timed since :meth:`start_timing`. Waits for the device."""
        timer, self._timer = self._timer or CommTimer(), None
        return timer.read()

    def close(self) -> None:
        """Give up the streams, once the device has done all that was started on it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._streams.clear()
        self._timer = None

    def _run_asynchronously(
        self, stream: torch.cuda.Stream, operation: Callable[[], object], after: Work | None
    ) -> Work:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if after is not None and after.done is not None:
            stream.wait_event(after.done)
        with torch.cuda.stream(stream):
            begin = self._timestamp() if self._timer is not None else None
            operation()
            done = self._timestamp()
        if self._timer is not None:
            self._timer.operations.append((begin, done))
        return Work(done, (operation, after))

    def _timestamp(self) -> Timestamp:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=self._timer is not None)
        event.record()
        return event

    def _stream(self, name: str) -> torch.cuda.Stream:
        if name not in self._streams:
            # First of those that wait for a multiprocessor: the products that follow need what it brings.
            self._streams[name] = torch.cuda.Stream(self.device, priority=-1)
        return self._streams[name]


def _seconds(spans: list[tuple[Timestamp, Timestamp]]) -> float:
    return sum(_between(*span) for span in spans)


def _between(begin: Timestamp, end: Timestamp) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
