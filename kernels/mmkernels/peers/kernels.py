"""Triton kernels that load rows from other GPUs' memory, which NVLink carries, and store them plainly.

Legend: W ranks, S rows of one rank for another, M = W * S rows, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


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

    `run` is ceil(M / STRIDES). The received row m is index[row], or with NUMBERED the row itself; where the index is
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
