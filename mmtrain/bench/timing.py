"""Times of what all ranks call together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def timed(run: Callable[[], object], repeats: int = 15, warmup: int = 4) -> float:
    """Median milliseconds of a call, all ranks together."""
    times = []
    for i in range(repeats + warmup):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        times.append((begin, end))
        if i == warmup:
            torch.cuda.synchronize()
            dist.barrier()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times[warmup + 1 :])


class Clock:
    """Moments on a device: CUDA events in the order of its work, or on a CPU the time itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event | float:
        """This moment."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        """Milliseconds between two moments; the device has to have passed both."""
        return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)

    def wait(self) -> None:
        """Let the host wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def timed_apart(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], dy: Tensor, seconds: float, warmup: int = 2
) -> tuple[float, float, list[Tensor]]:
    """Median milliseconds of forward and of backward on the slowest rank; all ranks call it.

    Ranks meet, on the device, before either begins: what one waits for another is in neither of them twice.

    Args:
        forward: what is differentiated.
        leaves: by which.
        dy: gradient of its result.
        seconds: that the repetitions may take together; there are 3 to 15 (2, without any seconds).
        warmup: calls before, at least 1; the last of them says how many repetitions there will be.

    Returns:
        Both, and the result with the gradients of the last call.
    """
    clock, meet = Clock(dy.device), torch.zeros(1, device=dy.device)
    found: list[Tensor] = []

    def call() -> list[torch.cuda.Event | float]:
        found.clear()  # before memory for the next is taken
        dist.all_reduce(meet)
        marks = [clock.mark()]
        y = forward()
        marks.append(clock.mark())
        dist.all_reduce(meet)
        marks.append(clock.mark())
        found.extend((y.detach(), *torch.autograd.grad(y, leaves, dy)))
        return [*marks, clock.mark()]

    for _ in range(warmup):
        marks = call()
        clock.wait()
    (ms,) = slowest([clock.ms(marks[0], marks[-1])], dy.device)
    repeats = min(max(round(seconds * 1e3 / ms), 3), 15) if seconds else 2
    calls = [call() for _ in range(repeats)]  # the host runs ahead, as in training
    clock.wait()
    apart = [[clock.ms(*marks[part : part + 2]) for marks in calls] for part in (0, 2)]
    forward_ms, backward_ms = slowest([statistics.median(values) for values in apart], dy.device)
    return forward_ms, backward_ms, found


def slowest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each over all ranks; a value that is not a number on any rank stays none on all."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    bad = largest.isnan().double()
    largest.nan_to_num_()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    return largest.masked_fill(bad > 0, torch.nan).tolist()
