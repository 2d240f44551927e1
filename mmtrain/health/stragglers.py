"""Ranks that are slower than the others, named: all wait for the slowest, so that step times do not say which it is.

Each rank measures two things that no other rank delays: a product of its device, and the time that it waits for rows. A
device that is throttled or shared shows in the first, slow storage of a host in the second.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from mmtrain.health.product_time import product_seconds

SLOW_PRODUCT = 1.2
"""Times the others' median from which on a device is slow. Ours: GPUs of one host differ by some percent."""
SLOW_READING = 0.05
"""Share of a step that a rank may wait for rows longer than others do. Ours."""
LEAST_READING = 0.02
"""Seconds likewise, whatever the step takes."""
PRODUCT = {"cuda": 4096, "cpu": 384}
"""Rows and columns of the matrices that are multiplied: a millisecond's work or less."""
IN_A_ROW = 2
"""Checks in a row after which a rank is named: one alone may have met something else that ran."""


class Pace(NamedTuple):
    """Seconds of a rank.

    Attributes:
        product: of a product on its device.
        reading: of waiting for the rows of a step, in the mean since the last check.
        step: of a step, likewise.
    """

    product: float
    reading: float
    step: float


class Stragglers:
    """Checks of all ranks' pace; collective.

    Args:
        interval: steps between them; 0 checks never.
        device: of this rank.
        dtype: of its products.

    Attributes:
        paces: of all ranks in their order, by the last call of :meth:`check`; empty where it compared nothing.
    """

    def __init__(self, interval: int, device: torch.device, dtype: torch.dtype) -> None:
        self._interval, self._device, self._dtype = interval, device, dtype
        self._reading: list[float] = []
        self._steps: list[float] = []
        self._slow_for: dict[tuple[int, str], int] = {}
        self.paces: Sequence[Pace] = ()

    def add(self, reading: float, step: float) -> None:
        """Take in a step: seconds that it waited for its rows, and in all."""
        self._reading.append(reading)
        self._steps.append(step)

    def check(self, step: int) -> list[str]:
        """Compare all ranks, if the step is one to do so after; returns a line on each that is slow, on all ranks."""
        self.paces = ()
        if self._interval == 0 or step % self._interval or dist.get_world_size() == 1 or not self._steps:
            return []
        mine = Pace(
            product_seconds(self._device, self._dtype, PRODUCT[self._device.type]),
            statistics.mean(self._reading),
            statistics.mean(self._steps),
        )
        self._reading, self._steps = [], []
        everyone: list[tuple[Pace, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, socket.gethostname()))
        paces, hosts = zip(*(one for one in everyone if one is not None), strict=True)
        found = slow_ranks(paces)
        self.paces = paces
        self._slow_for = {key: self._slow_for.get(key, 0) + 1 for key in found}
        return [f"rank {rank} ({hosts[rank]}) is slow, and all wait for it: {found[rank, what]}"
                for (rank, what), checks in self._slow_for.items() if checks == IN_A_ROW]  # fmt: skip


def pace_record(paces: Sequence[Pace]) -> dict[str, list[float]]:
    """Return the pace of all ranks as entries of a record, as long for a thousand ranks as for two.

    ``pace_product_s`` and ``pace_rows_s`` are the least, the median and the most of :class:`Pace`'s seconds over ranks,
    and the rank that has the most.

    Args:
        paces: of all ranks, in their order.
    """
    found = {}
    for name, values in (("product", [one.product for one in paces]), ("rows", [one.reading for one in paces])):
        most = max(values)
        figures = (min(values), statistics.median(values), most)
        found[f"pace_{name}_s"] = [*(float(f"{value:.4g}") for value in figures), values.index(most)]
    return found


def slow_ranks(paces: Sequence[Pace]) -> dict[tuple[int, str], str]:
    """Ranks whose device or whose rows take longer than the others', each with what was measured.

    Args:
        paces: of all ranks, in their order.
    """
    found = {}
    for rank, pace in enumerate(paces):
        others = [other for number, other in enumerate(paces) if number != rank]
        product, reading = (statistics.median(each) for each in zip(*(one[:2] for one in others), strict=True))
        if pace.product > SLOW_PRODUCT * product:
            found[rank, "device"] = (
                f"a product takes its device {pace.product * 1e3:.1f} ms, the others' {product * 1e3:.1f} (median)"
            )
        if pace.reading - reading > max(SLOW_READING * pace.step, LEAST_READING):
            found[rank, "rows"] = (
                f"it waits {pace.reading:.2f} s a step for its rows, the others {reading:.2f} (median), "
                f"in steps of {pace.step:.2f} s"
            )
    return found
