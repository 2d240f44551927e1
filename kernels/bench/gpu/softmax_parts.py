"""Time on the device of each kernel of packed softmax attention on Hopper, and what its launches cost the host.

    PYTHONPATH=kernels python -m bench.gpu.softmax_parts

Operations: 4 x (pairs of tokens) x D x H forward, half of the pairs under the causal mask, 2.5 times that backward; the
kernels' own rates count the products that they do, 2 forward, 3 for dq, 4 for dk and dv, of 5 that backward needs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from mmkernels.softmax.hopper import launch
from mmkernels.softmax.hopper.tiles import Documents

PRODUCTS = {"softmax_hopper_kernel": 2, "softmax_hopper_dq_kernel": 3, "softmax_hopper_dkv_kernel": 4}
REPEATS = 4


class Heads(NamedTuple):
    """Heads, key/value heads and head width."""

    heads: int
    kv_heads: int
    width: int


def many_lengths(tokens: int, least: int, most: int) -> list[int]:
    """Documents of lengths between two, even in their logarithm, until the row is full."""
    draw, found = random.Random(0), []
    while sum(found) < tokens:
        found.append(min(int(least * (most / least) ** draw.random()), tokens - sum(found)))
    return found


CODE = [700, 1500, 300, 2000, 1192, 500, 900, 1100]
WIDE, SMALL, MIDDLE = Heads(64, 8, 128), Heads(16, 2, 64), Heads(16, 2, 128)
CASES: dict[str, tuple[list[int], Heads]] = {
    "one document of 32,768": ([32768], WIDE),
    "one of 8,192": ([8192], WIDE),
    "540, 268, 3215, 1934, 2235": ([540, 268, 3215, 1934, 2235], WIDE),
    "64 to 8,192, in 32,768": (many_lengths(32768, 64, 8192), WIDE),
    "8 of 1,024": ([1024] * 8, WIDE),
    "8 of 1,024 on average": (CODE, SMALL),
    "the same, wider heads": (CODE, MIDDLE),
    "32 of 1,024 on average": (CODE * 4, MIDDLE),
}


def measure(name: str, lengths: Sequence[int], shape: Heads) -> str:
    """A line of the table."""
    device, tokens = torch.device("cuda"), sum(lengths)
    counts = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    q, k, v, do = (torch.randn(tokens, n, shape.width, device=device, dtype=torch.bfloat16) for n in counts)
    documents = Documents(tuple(lengths), tuple(lengths), True, device)

    def both_ways() -> None:
        o, lse = launch.forward(q, k, v, documents, shape.width**-0.5)
        launch.backward(do, q, k, v, o, lse, documents, shape.width**-0.5)

    host_us = 1e6 * host_seconds(both_ways)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(REPEATS):
            both_ways()
        torch.cuda.synchronize()
    events = [
        event for event in profiler.key_averages() if event.device_time_total and not event.key.startswith("aten")
    ]
    ms = {event.key: event.device_time_total / REPEATS / 1e3 for event in events}
    operations = 2 * sum(n * n for n in lengths) * shape.width * shape.heads
    rates = [operations * products / 2 / ms[kernel] / 1e9 for kernel, products in PRODUCTS.items()]
    forward = ms["softmax_hopper_kernel"]
    backward = sum(ms.values()) - forward
    shown = [f"{forward:.3f}", f"{backward:.3f}", *(f"{rate:.0f}" for rate in rates),
             f"{2.5 * operations / backward / 1e9:.0f}", f"{host_us:.0f}"]  # fmt: skip
    return f"| {name} | {shape.heads}:{shape.kv_heads} x {shape.width} | {' | '.join(shown)} |"


def host_seconds(call: Callable[[], None], repeats: int = 10) -> float:
    """Time that the host takes to launch, beside a device that is busy."""
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    passed = time.perf_counter() - began
    torch.cuda.synchronize()
    return passed / repeats


def main() -> None:
    """Print the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    columns = ["documents", "heads", "forward ms", "backward ms", "forward TFLOP/s", "dq TFLOP/s of its products",
               "dk and dv TFLOP/s of its products", "backward TFLOP/s", "host us"]  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, (lengths, shape) in CASES.items():
        print(measure(name, lengths, shape), flush=True)


if __name__ == "__main__":
    main()
