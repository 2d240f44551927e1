"""Times of what all ranks call together."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist


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
