"""The same on Triton: loads from other GPUs' memory, which NVLink carries, and plain stores.

Legend: W ranks, S rows of one rank for another, M = W * S rows, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.peers.api import PeerMemory

ROW_BLOCK, WARPS = 2048, 8
"""Most elements of a row that a program moves."""
STRIDES = 32
"""Rows that lie so many times apart are moved at the same time, so that they come from all ranks at once.

In order of their numbers, all ranks would read from the first one, then from the second, each by itself the narrowest
place.
"""


def triton_take(memory: PeerMemory, out_MD: Tensor, index_M: Tensor, numbered: bool) -> None:
    """See `mmkernels.peers.take_from_peers`, which has checked the arguments."""
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
    """See `mmkernels.peers.meet`."""
    meet_kernel[(len(memory.parts),)](memory.address_W, memory.rank, number, num_warps=1)


@triton.jit(do_not_specialize=["M", "S", "rank", "run"])
def take_kernel(
    address_ptr,
    index_ptr,
    out_ptr,
    M,
    S,
    rank,
    run,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDES: tl.constexpr,
    NUMBERED: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """out[row] = row `rank * S + m % S` of rank `m // S`. Grid: run * STRIDES * ceil(D / BLOCK_D).

    `run` is ceil(M / STRIDES). The arrival m is index[row], or with NUMBERED the row's own number; where the index is
    negative nothing is moved. WIDE says that rows begin at multiples of 16 bytes.
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    n = tl.program_id(0) // BLOCKS
    d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    row = n % STRIDES * run + n // STRIDES
    if row < M:
        m = tl.load(index_ptr + row)
        if m >= 0:
            if NUMBERED:
                m = row
            theirs_ptr = tl.load(address_ptr + m // S).to(tl.pointer_type(out_ptr.dtype.element_ty))
            if WIDE:
                theirs_ptr = tl.multiple_of(theirs_ptr, 16)
            at = (rank * S + m % S).to(tl.int64) * D + d
            tl.store(out_ptr + row.to(tl.int64) * D + d, tl.load(theirs_ptr + at, mask=d < D), mask=d < D)


@triton.jit(do_not_specialize=["rank", "number"])
def meet_kernel(address_ptr, rank, number) -> None:
    """Tell one rank that this one is there, and wait until it is. Grid: W.

    Every rank has a number for each other, which that one writes: nobody else does, and it only grows. Stores of
    earlier kernels of this stream are done when this one begins; `release` and `acquire` order them for other GPUs.

    Only these few programs wait, apart from those that read: did all multiprocessors wait here, a collective of another
    stream could not run, for which the late rank may be waiting in turn.
    """
    peer = tl.program_id(0)
    number = number.to(tl.int64)
    theirs_ptr = tl.load(address_ptr + peer).to(tl.pointer_type(tl.int64)) + rank
    mine_ptr = tl.load(address_ptr + rank).to(tl.pointer_type(tl.int64)) + peer
    tl.atomic_xchg(theirs_ptr, number, sem="release", scope="sys")
    seen = tl.atomic_add(mine_ptr, 0, sem="acquire", scope="sys")
    while seen < number:
        seen = tl.atomic_add(mine_ptr, 0, sem="acquire", scope="sys")
