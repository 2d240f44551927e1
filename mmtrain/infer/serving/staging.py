"""Whole numbers on their way to a device, a few hundred in every step: one buffer here, one there, one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Staging:
    """Memory of the host that a device copies from without being waited for, and where it copies to.

    Attributes:
        there: int64, on the device; it stays where it is, so that CUDA graphs can read it.

    Args:
        count: numbers that are sent at once at most.
        device: where they go.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.there = torch.zeros(count, dtype=torch.int64, device=device)
        self._pinned = torch.zeros(count, dtype=torch.int64, pin_memory=on_gpu)
        self._numbers = self._pinned.numpy()
        self._copied = torch.cuda.Event() if on_gpu else None

    def send(self, numbers: Sequence[int]) -> None:
        """Write numbers to the beginning of `there`, on the current stream; what lies behind them stays."""
        if self._copied is not None:  # a copy that still runs would send the new numbers
            self._copied.synchronize()
        count = len(numbers)
        self._numbers[:count] = numbers
        self.there[:count].copy_(self._pinned[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
