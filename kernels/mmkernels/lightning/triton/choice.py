"""Which launches the kernels for Hopper take."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mmkernels.common.triton_support import INTERPRETED
from mmkernels.lightning.triton.tiling import Tile, capability

HOPPER = True
"""Whether Hopper GPUs take the kernels that are written for them."""


def hopper_takes(tensors: tuple[Tensor, ...], tile: Tile) -> bool:
    """Whether the kernels for Hopper serve a launch: bfloat16 heads of 64 or 128 that can be copied by 16 bytes."""
    x = tensors[0]
    return (
        HOPPER
        and x.dtype == torch.bfloat16
        and tile.chunk == 64
        and capability(x.device) == (9, 0)
        and x.shape[3] in (64, 128)
        and all(y.shape[3] == x.shape[3] for y in tensors)
        and all((y.stride(1) | y.stride(2)) % 8 == 0 and y.data_ptr() % 16 == 0 for y in tensors)
        and bool(hopper_kernels())
    )


@functools.lru_cache
def hopper_kernels() -> dict[str, tuple[Any, int, int, int]]:
    """Kernel, most columns of a program, pipeline stages and warpgroups by launch; empty where this Triton lacks what
    they are written in.
    """
    if INTERPRETED:
        return {}
    try:
        from mmkernels.lightning.hopper.scan import KERNELS
        from mmkernels.lightning.hopper.states import states_hopper_kernel
    except ImportError:
        return {}
    return {**KERNELS, "states": (states_hopper_kernel, 64, 4, 1)}


def hopper_launch(role: str, width: int, chunk: int) -> tuple[Any, dict[str, int]]:
    """Kernel and block shape of a launch for heads of ``width``."""
    kernel, columns, stages, groups = hopper_kernels()[role]
    groups = min(groups, width // 64)
    shape = {"D": width, "C": chunk, "BE": min(width, columns), "STAGES": stages, "GROUPS": groups}
    return kernel, {**shape, "num_warps": 4 * groups}
