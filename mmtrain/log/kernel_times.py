"""Time of a device by kind of kernel, out of torch's profiler: what a step is made of, and where the device idles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

COMMUNICATION, PRODUCTS, OPTIMIZER = "communication", "matrix products", "optimizer"
KINDS: dict[str, tuple[str, ...]] = {
    COMMUNICATION: ("nccl", "meet_kernel", "take_kernel"),
    # The next two come before the others: names of CUTLASS's templates hold "copy" and "permute" too.
    "softmax attention": ("flash", "fmha", "cudnn_generated", "softmax_", "paged_"),
    PRODUCTS: ("gemm", "cutlass", "nvjet", "cublas", "splitk", "xmma", "_mm_", "int8_"),
    "loss": ("cross_entropy",),
    "embedding": ("embedding", "radixsort"),
    "routing": ("router_", "route_", "slots", "sort_received", "permute"),
    "lightning attention": ("lightning_", "scan_hopper", "scan_kernel", "dk_dv", "states_", "padded_chunks"),
    "copies": ("memcpy", "memset", "copy", "catarray", "chunk_cat"),
    OPTIMIZER: ("adam", "multi_tensor_apply"),  # clipping is its too
    "norms": ("norm",),
    "SwiGLU": ("swiglu",),
    "RoPE": ("rope_",),
    "choice of tokens": ("largest_", "argmax"),
}
"""Parts of kernels' names, in lower case, by kind; the first kind that fits takes the kernel."""
OTHER = "elementwise and the rest"


class KernelTime(NamedTuple):
    """One run of a kernel, a copy or a fill of memory on the device.

    Attributes:
        name: as the profiler has it.
        begin, end: nanoseconds.
        stream: number of the stream that it ran in.
    """

    name: str
    begin: int
    end: int
    stream: int = 0


class KindTime(NamedTuple):
    """Time of all kernels, or operators, of a kind.

    Attributes:
        seconds: summed over them; those of several streams count each.
        launches: how many they are.
    """

    seconds: float
    launches: int


class Gap(NamedTuple):
    """A pause of the device.

    Attributes:
        seconds: its length.
        before, after: names of the kernels around it.
    """

    seconds: float
    before: str
    after: str


@dataclass(frozen=True)
class KernelTimes:
    """Kernels that a device ran in a span of time.

    Attributes:
        runs: every kernel, by its beginning.
    """

    runs: tuple[KernelTime, ...]

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one kernel ran."""
        return _union_seconds(self.runs)

    @property
    def idle_seconds(self) -> float:
        """Seconds between the first kernel's beginning and the last one's end in which none ran."""
        if not self.runs:
            return 0.0
        return (max(run.end for run in self.runs) - self.runs[0].begin) / 1e9 - self.busy_seconds

    @property
    def exposed_communication_seconds(self) -> float:
        """Seconds in which kernels of communication ran and no others: what nothing hides."""
        computing = (run for run in self.runs if kind_of(run.name) != COMMUNICATION)
        return self.busy_seconds - _union_seconds(computing)

    def by_kind(self) -> dict[str, KindTime]:
        """Time of the kernels of each kind, the longest first."""
        return summed((kind_of(run.name), run.end - run.begin, 1) for run in self.runs)

    def by_name(self) -> dict[str, KindTime]:
        """Time of the kernels of each name, the longest first."""
        return summed((run.name, run.end - run.begin, 1) for run in self.runs)

    def gaps(self, least: float = 2e-5) -> list[Gap]:
        """Pauses of at least `least` seconds, the longest first."""
        found, until, before = [], self.runs[0].begin if self.runs else 0, ""
        for run in self.runs:
            if run.begin - until >= least * 1e9 and before:
                found.append(Gap((run.begin - until) / 1e9, before, run.name))
            if run.end >= until:
                until, before = run.end, run.name
        return sorted(found, reverse=True)


def kind_of(name: str) -> str:
    """Return what a kernel does, by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), OTHER)


def profile(run: Callable[[], object]) -> KernelTimes:
    """Call `run` under torch's profiler and return what the GPU did; waits for it."""
    return kernel_times(profiled(run))


def profiled(run: Callable[[], object], device_type: str = "cuda") -> torch.profiler.profile:
    """Call `run` under torch's profiler and return the profiler; waits for the device.

    A GPU is watched alone, without the operators of the host: recording these would slow the host down, and the pauses
    of the device would be the profiler's.

    Args:
        run: the work.
        device_type: of the device to watch, `cuda` or `cpu`.
    """
    if device_type == "cpu":
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
            run()
        return profiler
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return profiler


def kernel_times(profiler: torch.profiler.profile) -> KernelTimes:
    """Return what a profiler that has ended saw on the device: none on a CPU."""
    events = profiler.profiler.kineto_results.events()
    runs = (
        KernelTime(
            event.name(), event.start_ns(), event.start_ns() + event.duration_ns(), int(event.device_resource_id())
        )
        for event in events
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()  # which span kernels and pauses
    )
    return KernelTimes(tuple(sorted(runs, key=lambda run: run.begin)))


def summed(named: Iterable[tuple[str, int, int]]) -> dict[str, KindTime]:
    """Sum nanoseconds and launches by name, the longest first."""
    sums: dict[str, list[int]] = {}
    for name, nanoseconds, launches in named:
        one = sums.setdefault(name, [0, 0])
        one[0] += nanoseconds
        one[1] += launches
    return {name: KindTime(time / 1e9, count) for name, (time, count) in sorted(sums.items(), key=lambda s: -s[1][0])}


def _union_seconds(runs: Iterable[KernelTime]) -> float:
    """Seconds that lie in at least one of the runs, which come by their beginning."""
    total, until = 0, 0
    for run in runs:
        total += max(0, run.end - max(run.begin, until))
        until = max(until, run.end)
    return total / 1e9
