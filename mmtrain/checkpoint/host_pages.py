"""Memory of the host for copies of a rank's tensors: mapped, its pages made by several threads, pinned for a GPU.

Pinning makes the pages that it does not find, one after the other on one thread.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor

from mmtrain.checkpoint.thread_call import ThreadCall

_MOST_THREADS = 8
_PART = 1 << 14  # pages that a thread touches at a time: fewer than torch fills with threads of its own


def map_pages(size: int) -> Tensor:
    """Return bytes in large pages that forked processes do not get: the loaders' workers need none of them."""
    memory = mmap.mmap(-1, size)
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        with suppress(AttributeError, OSError):
            memory.madvise(getattr(mmap, advice))
    return torch.frombuffer(memory, dtype=torch.uint8)


def touch_pages(memory_N: Tensor, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Have the system make all pages of memory that nothing was written to yet, by writing a 0 into each.

    Args:
        memory_N: uint8, from the beginning of a page on.
        is_stopped: whether the pages are not wanted any more; asked before each part.

    Raises:
        Exception: of the first thread that failed; none touches the memory any more.
    """
    parts = memory_N[:: mmap.PAGESIZE].split(_PART)
    threads = min(_MOST_THREADS, _cores(), len(parts))

    def touch(own: Sequence[Tensor], call: ThreadCall) -> None:
        for part in own:
            if call.is_stopped or is_stopped():
                return
            part.fill_(0)

    with ExitStack() as ended:
        calls = []
        for i in range(threads):
            calls.append(ThreadCall(f"pages-{i}", lambda call, own=parts[i::threads]: touch(own, call)))
            ended.callback(calls[-1].give_up)
        for call in calls:
            call.wait()


def pin(memory_N: Tensor) -> bool:
    """Pin memory for the current GPU and all others; whether the system pins as much."""
    return int(torch.cuda.cudart().cudaHostRegister(memory_N.data_ptr(), memory_N.numel(), 0)) == 0


def unpin(memory_N: Tensor) -> None:
    """Undo :func:`pin`; no copy is under way."""
    torch.cuda.cudart().cudaHostUnregister(memory_N.data_ptr())


def _cores() -> int:
    """Return how many of the processor's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
