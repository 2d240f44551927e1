"""Results of two blocks of keys joined by one Triton kernel: one pass over the rows, in place, float32 inside.

Legend: T queries (`tokens`), H heads, D head width (`WIDTH`). A program takes BLOCK_T queries of one head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def softmax_merge_kernel(
    o_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    tokens,
    o_stride_t,
    o_stride_h,
    lse_stride_h,
    lse_stride_t,
    part_stride_t,
    part_stride_h,
    part_lse_stride_h,
    part_lse_stride_t,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Add a block's part to the output and log-sum-exp of other keys."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_row = t < tokens
    lse_ptrs = lse_ptr + h * lse_stride_h + t * lse_stride_t
    lse = tl.load(lse_ptrs, mask=in_row, other=float("-inf"))
    part_lse = tl.load(part_lse_ptr + h * part_lse_stride_h + t * part_lse_stride_t, mask=in_row, other=float("-inf"))
    largest = tl.maximum(lse, part_lse)
    # A query that has seen no key: -inf - -inf would be no number.
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    mine, other = tl.exp(lse - largest), tl.exp(part_lse - largest)
    total = mine + other
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    joined = tl.where(unseen, float("-inf"), largest + tl.log(total))
    in_tile = in_row[:, None] & (d < WIDTH)[None, :]
    o_ptrs = o_ptr + h * o_stride_h + t[:, None] * o_stride_t + d[None, :]
    o = tl.load(o_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    part_ptrs = part_ptr + h * part_stride_h + t[:, None] * part_stride_t + d[None, :]
    part = tl.load(part_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    o = o * (mine / total)[:, None] + part * (other / total)[:, None]
    # Threads may hold the same element: all have to have read it before one writes it.
    tl.debug_barrier()
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=in_tile)
    tl.store(lse_ptrs, joined, mask=in_row)
