"""Triton kernels of largest logits: programs that share out the columns of each row, and one a row that joins them.

Legend: N rows, V columns of the vocabulary, S parts of a row. A lane is one of the `BLOCK` columns that a program reads
at once: each keeps the largest value that it met, and where its block began, so that programs reduce once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["V", "known", "blocks"])
def largest_part_kernel(
    logits_ptr, top_ptr, column_ptr, finite_ptr, row_stride, V, known, blocks,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """Largest of a part's columns below `known`, its column, and whether all of the part are finite. Grid: N, S.

    A part is `blocks` blocks, the last of a row what is left. Where all its columns are from `known` on, it finds -inf
    there; the first part has column 0, so that this is never chosen.
    """
    row_ptr = logits_ptr + tl.program_id(0).to(tl.int64) * row_stride
    lanes = tl.arange(0, BLOCK)
    begin = tl.program_id(1) * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, V)
    whole = begin + tl.maximum(tl.minimum(end, known) - begin, 0) // BLOCK * BLOCK  # to where no column needs a mask
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    block = tl.full([BLOCK], 0, tl.int32) + begin
    most = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(begin, whole, BLOCK, loop_unroll_factor=UNROLL):
        x = tl.load(row_ptr + first + lanes).to(tl.float32)
        most = tl.maximum(most, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        top, block = _larger(top, block, x, first)
    for first in range(whole, end, BLOCK):
        columns = first + lanes
        x = tl.load(row_ptr + columns, mask=columns < end, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        top, block = _larger(top, block, tl.where(columns < tl.minimum(end, known), x, float("-inf")), first)
    top, column = _first_of_largest(top, block + lanes)
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(top_ptr + at, top)
    tl.store(column_ptr + at, column)
    tl.store(finite_ptr + at, tl.min((most < float("inf")).to(tl.int32), 0))


@triton.jit(do_not_specialize=["parts"])
def largest_join_kernel(top_ptr, column_ptr, finite_ptr, found_ptr, parts, BLOCK_S: tl.constexpr) -> None:
    """Column of the largest of a row's parts, and whether all of them are finite. Grid: N."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    real = s < parts
    top = tl.load(top_ptr + n * parts + s, mask=real, other=float("-inf"))
    column = tl.load(column_ptr + n * parts + s, mask=real, other=NOWHERE)
    finite = tl.load(finite_ptr + n * parts + s, mask=real, other=1)
    tl.store(found_ptr + n, _first_of_largest(top, column)[1].to(tl.int64))
    tl.store(found_ptr + tl.num_programs(0) + n, tl.min(finite, 0).to(tl.int64))


@triton.jit
def _larger(top, block, x, first):
    """The larger of what lanes have and what they meet, and the block that it is from: of equal ones the earlier.

    A NaN is larger than any number, and the first NaN stays.
    """
    takes = (top == top) & ~(x <= top)
    return tl.where(takes, x, top), tl.where(takes, first, block)


@triton.jit
def _first_of_largest(top, column):
    """The largest of all lanes, or NaN where one has that, and the first column that has it."""
    is_nan = top != top
    largest = tl.max(tl.where(is_nan, float("-inf"), top), 0)
    some_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    has_it = tl.where(some_nan, is_nan, top == largest)
    return tl.where(some_nan, float("nan"), largest), tl.min(tl.where(has_it, column, NOWHERE), 0)
