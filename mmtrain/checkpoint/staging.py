"""Copy of a rank's tensors in host memory, which is taken while the next step computes its gradients.

Weights and moments change in the optimizer's step alone, so that their copy has the time of a forward and a backward
pass: on a GPU it runs on a stream of its own into pinned memory, on a host in the thread that writes the checkpoint.
Buffers, which a step changes sooner, and small tensors are copied at once.

A GPU's link takes longer than a step for a large state: 22 GB of a model of 1.8B parameters take 0.4 s at 55 GB/s, its
step 0.16. What fits into the GPU's free memory is copied there first, in 11 ms at a copy's rate, and goes to the host
from there while the next steps run.

Pinning the host's memory takes seconds. A thread can do it beside the loading of a checkpoint
(:meth:`StagingBuffer.begin_reserve`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from mmtrain.checkpoint.device_memory import DeviceMemory, free_bytes, take
from mmtrain.checkpoint.host_pages import map_pages, pin, touch_pages, unpin
from mmtrain.checkpoint.thread_call import ThreadCall

_SMALL = 1 << 16  # bytes: the copy of such a tensor takes no longer than its start
_ALIGNMENT = 16  # bytes
_PART = 64 << 20  # bytes that a GPU's link is given at a time: 1.2 ms at 55 GB/s


class StagingBuffer:
    """Memory for copies of a rank's tensors, kept from save to save.

    Args:
        device: of the rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer, self._pinned = torch.empty(0, dtype=torch.uint8), False
        self._reserving: ThreadCall | None = None  # sets the buffer: nothing else looks at it meanwhile
        self._later: list[tuple[Tensor, Tensor]] = []
        self._sources: list[Tensor] = []
        self._held: DeviceMemory | None = None
        self._held_later: list[tuple[Tensor, Tensor]] = []
        self._event: torch.cuda.Event | None = None  # until it, sources on the device may not change
        self._host_done = threading.Event()
        self.tensors: list[Tensor] = []

    def start(self, tensors: Sequence[Tensor], at_once: Sequence[bool]) -> None:
        """Begin to copy; nothing of an earlier copy is in use any more, finished or not.

        Args:
            tensors: wider dtypes first, contiguous or not.
            at_once: of each tensor, whether it may change before :meth:`wait` is called.
        """
        self._let_go()
        self.reserve(sum(tensor.nbytes for tensor in tensors))
        self.tensors, begin = [], 0
        for tensor in tensors:
            flat = self._buffer[begin : begin + tensor.nbytes].view(tensor.dtype)
            self.tensors.append(flat.view(tensor.shape))
            begin += tensor.nbytes
        self._later, self._event = [], None
        self._host_done.clear()
        on_device = []
        for source, copy, now in zip(tensors, self.tensors, at_once, strict=True):
            if source.is_cuda:
                on_device.append((source.clone() if now else source, copy))
            elif now or source.nbytes <= _SMALL:
                copy.copy_(source)
            else:
                self._later.append((source, copy))
        if not self._later:  # no thread of the host copies anything that may not change
            self._host_done.set()
        if on_device:
            self._start_on_device(on_device)

    def _start_on_device(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        assert self._stream is not None
        first = self._hold(pairs)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for source, copy in pairs[:first]:
                copy.copy_(source, non_blocking=True)
            self._event = self._stream.record_event()
        self._sources = [source for source, _ in pairs]  # their memory is not given away before they are read
        self._held_later = pairs[first:]

    def _hold(self, pairs: list[tuple[Tensor, Tensor]]) -> int:
        """Put copies on the device into the place of the last sources, as many as it has room for; where they begin."""
        device, sizes = pairs[0][0].device, [source.nbytes for source, _ in pairs]
        first = first_held(sizes, free_bytes(device))
        size = sum(map(held_bytes, sizes[first:]))
        self._held = take(device, size) if size else None
        if self._held is None:
            return len(pairs)
        begin = 0
        for i, (source, copy) in enumerate(pairs[first:], first):
            held = self._held.bytes_N[begin : begin + source.nbytes].view(source.dtype).view(source.shape)
            pairs[i] = held.copy_(source), copy
            begin += held_bytes(source.nbytes)
        return first

    def finish(self) -> list[Tensor]:
        """Return the copies when they are whole; for the thread that writes them."""
        try:
            for source, copy in self._later:
                copy.copy_(source)
        finally:
            self._host_done.set()
        if self._event is not None:
            self._event.synchronize()
            self._bring_over()
        self._let_go()
        return self.tensors

    def _bring_over(self) -> None:
        """Copy what is held to the host, a part at a time: a step's own copies, as of its loss, wait for one alone."""
        with torch.cuda.stream(self._stream):
            for source, copy in self._held_later:
                step = _PART // source.itemsize
                for part, to in zip(source.flatten().split(step), copy.flatten().split(step), strict=True):
                    to.copy_(part, non_blocking=True)
                    torch.cuda.current_stream().synchronize()

    def _let_go(self) -> None:
        """Forget the sources; nothing reads them any more."""
        self._later, self._held_later, self._sources = [], [], []
        if self._held is not None:
            self._held.free()
            self._held = None

    def wait(self) -> None:
        """Let the tensors change from here on: what changes them on the device comes after the copy, in order."""
        self._host_done.wait()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def begin_reserve(self, size: int) -> None:
        """Begin to have memory for so many bytes, in a thread; no copy is in use before :meth:`wait_reserved` returns.

        Until then no stream may record a graph: pinning is no call that a recording allows, on any thread.

        Raises:
            Exception: as :meth:`wait_reserved` raises it, of what was begun before.
        """
        self.wait_reserved()
        if self._buffer.numel() < size:
            self._reserving = ThreadCall("reserve", lambda call: self._reserve(size, call))

    def reserve(self, size: int) -> None:
        """Have memory for so many bytes, pinned for a GPU, which takes its time. No copy is in use.

        Raises:
            Exception: as :meth:`wait_reserved` raises it.
        """
        self.begin_reserve(size)
        self.wait_reserved()

    def wait_reserved(self) -> None:
        """Return when the memory is there that :meth:`begin_reserve` began to have; at once where nothing is begun.

        Raises:
            Exception: the system maps no more memory; again each time, until :meth:`release`.
        """
        if self._reserving is not None:
            self._reserving.wait()
            self._reserving = None  # only now: who is interrupted before, releases it

    def _reserve(self, size: int, call: ThreadCall) -> None:
        self._free()
        memory_N = map_pages(size)
        if self._stream is not None:
            touch_pages(memory_N, lambda: call.is_stopped)
            if call.is_stopped:
                return
            with torch.cuda.device(self._stream.device):  # of this thread
                # Where the system pins no more, the copies are right all the same, and the steps wait for them.
                self._pinned = pin(memory_N)  # torch's own pinned memory comes in powers of two
        self._buffer = memory_N

    def release(self) -> None:
        """Give the memory back, once a thread that reserves it has ended; no copy is in use."""
        if self._reserving is not None:
            self._reserving.give_up()
            self._reserving = None
        self._let_go()
        self._free()

    def _free(self) -> None:
        if self._pinned:
            unpin(self._buffer)
        self._buffer, self._pinned, self.tensors = torch.empty(0, dtype=torch.uint8), False, []


def held_bytes(size: int) -> int:
    """Bytes that a tensor takes of a device's memory: it begins where any dtype can."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def first_held(sizes: Sequence[int], room: int) -> int:
    """Return from which tensor on all fit into so many bytes of a device; their number if not even the last does."""
    first = len(sizes)
    while first and (room := room - held_bytes(sizes[first - 1])) >= 0:
        first -= 1
    return first
