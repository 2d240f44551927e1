"""Rates of one device, and of the ways between ranks: short, each the best of a few repetitions."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from mmtrain.health.product_time import product_seconds

# Sizes: large enough for a rate that says something, small enough for a fraction of a second.
_MATRIX = {"cuda": 8192, "cpu": 384}
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**25}
_MESSAGE_BYTES = {"cuda": 2**28, "cpu": 2**20}
_REPEATS = {"cuda": 7, "cpu": 15}


def device_rates(device: torch.device) -> dict[str, float]:
    """Return matrix rate (TFLOP/s, bf16 on a GPU and fp32 on a CPU) and copy bandwidths (GB/s, read and written)."""
    size = _MATRIX[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = {"matrix": 2 * size**3 / product_seconds(device, dtype, size, _REPEATS[device.type]) / 1e12}
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates["copy"] = 2 * source.numel() / _seconds(lambda: target.copy_(source), device) / 1e9
    if device.type == "cuda":
        host = torch.empty(source.numel() // 4, dtype=torch.uint8, pin_memory=True)
        part = source[: host.numel()]
        rates["host_copy"] = host.numel() / _seconds(lambda: part.copy_(host, non_blocking=True), device) / 1e9
    return rates


def group_rates(device: torch.device) -> dict[str, float]:
    """Return bandwidths within the default process group, in GB/s that each rank sends. Collective."""
    ranks = dist.get_world_size()
    count = _MESSAGE_BYTES[device.type] // 4 // ranks * ranks
    data, received = torch.zeros(count, device=device), torch.empty(count, device=device)
    moved = 4 * count * (ranks - 1) / ranks
    return {
        "all_reduce": 2 * moved / _seconds(lambda: dist.all_reduce(data), device) / 1e9,
        "all_to_all": moved / _seconds(lambda: dist.all_to_all_single(received, data), device) / 1e9,
    }


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the least time of a call, after one that does not count: other load makes it longer, nothing shorter."""
    times = []
    for _ in range(_REPEATS[device.type] + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
