"""Reading other GPUs' memory through the Triton kernels, with the launch shapes (all tunables are here).

Legend: W ranks, S rows of one rank for another, M = W * S rows, D columns.
"""

from __future__ import annotations

import triton
from torch import Tensor

from mmkernels.peers.kernels import meet_kernel, take_kernel
from mmkernels.peers.memory import PeerMemory

ROW_BLOCK, WARPS = 2048, 8
"""Most elements of a row that a program moves."""
STRIDES = 32
"""Rows that lie so many times apart are moved at the same time, so that they come from all ranks at once.

In order of their numbers, all ranks would read from the first one, then from the second, each by itself the narrowest
place.
"""


def triton_take(memory: PeerMemory, out_MD: Tensor, index_M: Tensor, numbered: bool) -> None:
    """Rows of other ranks, to `out_MD`: the backend "triton" of `take_from_peers`, which has checked the arguments."""
    rows, width = out_MD.shape
    if not out_MD.numel():
        return
    block = max(16, min(ROW_BLOCK, triton.next_power_of_2(width)))
    run = triton.cdiv(rows, STRIDES)
    wide = width * out_MD.element_size() % 16 == 0
    take_kernel[(run * STRIDES * triton.cdiv(width, block),)](
        memory.address_W, index_M, out_MD, rows, rows // len(memory.parts), memory.rank, run,
        D=width, BLOCK_D=block, STRIDES=STRIDES, NUMBERED=numbered, WIDE=wide, num_warps=min(WARPS, block // 32 or 1),
    )  # fmt: skip


def triton_meet(memory: PeerMemory, number: int) -> None:
    """One launch that ends when all ranks' have begun: see `meet`, which has checked the memory."""
    meet_kernel[(len(memory.parts),)](memory.address_W, memory.rank, number, num_warps=1)
