"""The launches that the kernels for Hopper take, and the block shapes they take them with."""

from __future__ import annotations

import functools
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.common.triton_support import INTERPRETED
from mmkernels.lightning.triton.tiling import Tile, capability


class Launch(Enum):
    """The launches that have a kernel for Hopper."""

    SCAN = auto()
    SCAN_PACKED_SILU_GRAD = auto()
    """A scan over padded chunks, whose output is multiplied by SiLU's derivative."""
    DK_DV = auto()
    """Both reversed scans, which write dk and dv."""
    STATES = auto()
    """The states that segments leave behind."""


class HopperTile(NamedTuple):
    """Block shape of a launch on Hopper: the most columns of a program, pipeline stages, warpgroups."""

    columns: int
    stages: int
    warpgroups: int


HOPPER_TILES = {
    Launch.SCAN: HopperTile(64, 4, 1),
    Launch.SCAN_PACKED_SILU_GRAD: HopperTile(64, 4, 2),
    Launch.DK_DV: HopperTile(128, 3, 2),
    Launch.STATES: HopperTile(64, 4, 1),
}
"""Block shapes as measured on an H100.

With 128 columns programs read half as much of what others read too through the L2 cache, which limits dk and dv (1.08
instead of 1.34 ms); a scan is limited by memory, and wants the programs (0.72 ms; 0.74 with two warpgroups). One
with SiLU's derivative takes 1.12 ms, 1.43 with two warpgroups; but 1.35 and 1.10 when the row is packed.
"""


def hopper_takes(tensors: tuple[Tensor, ...], tile: Tile) -> bool:
    """Whether the kernels for Hopper serve a launch: bfloat16 heads of 64 or 128 that can be copied by 16 bytes."""
    x = tensors[0]
    return (
        x.dtype == torch.bfloat16
        and tile.chunk == 64
        and capability(x.device) == (9, 0)
        and x.shape[3] in (64, 128)
        and all(y.shape[3] == x.shape[3] for y in tensors)
        and all((y.stride(1) | y.stride(2)) % 8 == 0 and y.data_ptr() % 16 == 0 for y in tensors)
        and bool(hopper_kernels())
    )


@functools.lru_cache
def hopper_kernels() -> dict[Launch, Any]:
    """Kernel of each launch; empty in the interpreter, and where this Triton has no Gluon to write them in."""
    if INTERPRETED:
        return {}
    try:
        from mmkernels.lightning.hopper.scan import dk_dv_hopper_kernel, scan_hopper_kernel
        from mmkernels.lightning.hopper.states import states_hopper_kernel
    except ImportError:
        return {}
    return {
        Launch.SCAN: scan_hopper_kernel,
        Launch.SCAN_PACKED_SILU_GRAD: scan_hopper_kernel,
        Launch.DK_DV: dk_dv_hopper_kernel,
        Launch.STATES: states_hopper_kernel,
    }


def hopper_launch(launch: Launch, width: int, chunk: int) -> tuple[Any, dict[str, int]]:
    """Kernel of a launch, and its block shape, for heads of ``width``."""
    columns, stages, warpgroups = HOPPER_TILES[launch]
    warpgroups = min(warpgroups, width // 64)
    shape = {"K": width, "BT": chunk, "BV": min(width, columns), "NUM_STAGES": stages, "WARPGROUPS": warpgroups}
    return hopper_kernels()[launch], {**shape, "num_warps": 4 * warpgroups}
