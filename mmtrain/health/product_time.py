"""Time of a product on a device: its rate, and whether it is slower than others."""

from __future__ import annotations

import time

import torch


def product_seconds(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 6) -> float:
    """Return the seconds of a product of two matrices of random numbers; a GPU's clock follows what it multiplies.

    The best of several, as other processes of the run measure at the same time, and the first finds caches cold.

    Args:
        device: multiplies.
        dtype: of the matrices.
        size: their rows and columns.
        repeats: how often.
    """
    own = torch.Generator(device).manual_seed(0)  # the run's own numbers are left alone
    a = torch.randn(size, size, dtype=dtype, device=device, generator=own)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return best
