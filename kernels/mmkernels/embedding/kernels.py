"""The sum of rows in one Triton kernel, over tokens in sorted order.

Legend: T tokens, V rows of the table, D columns (`WIDTH`). A program takes BLOCK_D columns of one run of equal tokens,
BLOCK_T rows of `dy` at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["vocabulary"])
def embedding_add_rows_kernel(
    total_ptr,
    token_ptr,
    position_ptr,
    end_ptr,
    dy_ptr,
    vocabulary,
    dy_stride,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Add each run's rows of `dy` to its token's row of `total`, which no other program touches.

    Grid: T * ceil(D / BLOCK_D), the columns of a run beside each other, so that those of a long run begin together.

    Args:
        total_ptr: [V, D], changed.
        token_ptr: [T], the tokens in sorted order.
        position_ptr: [T], where each of them was, in ascending order within a run.
        end_ptr: [T], where in sorted order the run ends that each of them is of.
        dy_ptr: [T, D] with contiguous rows, not sorted.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    first = tl.program_id(0) // blocks
    token = tl.load(token_ptr + first).to(tl.int64)
    before = tl.load(token_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (token < 0) | (token >= vocabulary) | (token == before):  # only the first of a run works
        return
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ptrs = total_ptr + token * WIDTH + d
    total = tl.load(row_ptrs, mask=d < WIDTH, other=0.0)
    end = tl.load(end_ptr + first)
    sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_T):
        at = start + tl.arange(0, BLOCK_T)
        position = tl.load(position_ptr + at, mask=at < end, other=0).to(tl.int64)
        dy_ptrs = dy_ptr + position[:, None] * dy_stride + d[None, :]
        sums += tl.load(dy_ptrs, mask=(at < end)[:, None] & (d < WIDTH)[None, :], other=0.0).to(tl.float32)
    tl.store(row_ptrs, total + tl.sum(sums, 0), mask=d < WIDTH)
