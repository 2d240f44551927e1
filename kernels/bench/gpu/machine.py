"""The GPU's rates, the timer, and what the result says of the machine and its software."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from bench.gpu.table import Call


def gpu_timer(quick: bool) -> Callable[[Call], float]:
    """Median milliseconds that the GPU works on a call: captured in a CUDA graph and replayed by Triton's ``do_bench``,
    which clears the L2 cache before each replay. A call that cannot be captured is timed as it is launched.
    """
    launched = launched_timer(quick)

    def timer(call: Call) -> float:
        graph = captured(call)
        return launched(call if graph is None else graph.replay)

    return timer


def captured(call: Call) -> torch.cuda.CUDAGraph | None:
    """The call as a CUDA graph; None if it waits for the device or does something else that a graph cannot."""
    call()  # compiles and tunes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def launched_timer(quick: bool) -> Callable[[Call], float]:
    """Median milliseconds of a call as a program makes it, with the host's work where the GPU waits for that."""
    from triton.testing import do_bench

    def timer(call: Call) -> float:
        call()  # compiles and tunes
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        warmup = 5 if quick else 25
        return do_bench(call, warmup, repetition_ms(start.elapsed_time(end), quick), return_mode="median")

    return timer


def repetition_ms(once_ms: float, quick: bool) -> float:
    """How long to repeat: 200 ms for the short, seven calls of the long, at most 700 ms."""
    if quick:
        return 40
    return 200 if once_ms < 1 else min(max(100, 7 * once_ms), 700)


def compiled(function: Callable) -> Callable:
    """``torch.compile`` for this shape alone, with a clean slate."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def copy_gbps(timer: Callable[[Call], float]) -> float:
    """Bytes read and written by a copy of 2 GiB in bfloat16, GB/s. Give a timer that launches it: in the one run that
    captured it in a CUDA graph it came out at 2,435 where launched copies gave 3,017 each time; why was not found out.
    """
    source = torch.randn(1024**3, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e6


def matmul_tflops(timer: Callable[[Call], float]) -> float:
    """Rate of a bfloat16 product, 8192 cubed."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / timer(lambda: a @ b) / 1e9


def short_name(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` is `h100`; what has no such word becomes a slug of its name."""
    words = re.sub(r"nvidia|geforce|amd|instinct", " ", device.lower())
    model = re.search(r"\b[a-z]{1,3}\d+[a-z]*\b", words)
    return model.group() if model else "-".join(re.findall(r"[a-z0-9]+", words)) or "gpu"


def versions() -> dict[str, Any]:
    """Versions of what was measured; None for what is not installed."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name, packages in (("triton", ["triton"]), ("fla", ["flash-linear-attention", "fla-core"])):
        found[name] = next((v for v in map(_version, packages) if v is not None), None)
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
