"""The last Triton kernel of routing, which drops what is over an expert's capacity and numbers the rest.

README.md tells how it works.

Legend: E experts, K experts a token, A = T * K assignments (a = t * K + k), R rows. `EP` is E rounded up to a power of
two.
"""

from __future__ import annotations

import triton
import triton.language as tl

DIGIT_PASSES = tl.constexpr(15)
"""Passes of 2 bits over a priority's 30."""


@triton.jit
def _threshold(list_ptr, assigned, capacity, passes, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The capacity-th largest of a list's priorities, 2 bits a pass, and how many are larger."""
    threshold, above = 0, 0
    for step in range(passes):
        shift = 2 * (DIGIT_PASSES - 1) - 2 * step
        reach1, reach2, reach3 = 0, 0, 0
        for first in range(0, assigned, BLOCK):
            i = first + tl.arange(0, BLOCK)
            priority = tl.load(list_ptr + i, mask=i < assigned, other=-1)
            digit = (priority - threshold) >> shift
            # Three counts in one sum: 20 bits each.
            flags = (digit >= 1).to(tl.int64) + ((digit >= 2).to(tl.int64) << 20) + ((digit >= 3).to(tl.int64) << 40)
            packed = tl.sum(flags, axis=0)
            reach1 += (packed & 0xFFFFF).to(tl.int32)
            reach2 += ((packed >> 20) & 0xFFFFF).to(tl.int32)
            reach3 += (packed >> 40).to(tl.int32)
        digit1, digit2, digit3 = reach1 >= capacity, reach2 >= capacity, reach3 >= capacity
        # The next larger digit's count is what lies above; past digit 3 that is the previous pass's count.
        above = tl.where(digit3, above, tl.where(digit2, reach3, tl.where(digit1, reach2, reach1)))
        threshold += (digit1.to(tl.int32) + digit2.to(tl.int32) + digit3.to(tl.int32)) << shift
    return threshold, above


@triton.jit(do_not_specialize=["R", "limit"])
def route_drop_kernel(
    list_priority_ptr,
    list_assignment_ptr,
    assigned_ptr,
    row_ptr,
    token_ptr,
    count_ptr,
    offset_ptr,
    R,
    limit,
    quota_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    PROBS: tl.constexpr,
    QUOTAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Drop what one expert has over capacity and number the rest: row_TK, token_R, count_E, offset_E. Grid: E.

    The capacity is `limit`, or with QUOTAS each expert's own.
    """
    expert = tl.program_id(0)
    e = tl.arange(0, EP)
    assigned_E = tl.load(assigned_ptr + e, mask=e < E, other=0)
    count_E = tl.minimum(assigned_E, limit)
    capacity = limit
    if QUOTAS:
        quota_E = tl.load(quota_ptr + e, mask=e < E, other=0)
        count_E = tl.minimum(assigned_E, quota_E)
        capacity = tl.sum(tl.where(e == expert, quota_E, 0), axis=0)
    assigned = tl.sum(tl.where(e == expert, assigned_E, 0), axis=0)
    count = tl.minimum(assigned, capacity)
    start = tl.sum(tl.where(e < expert, assigned_E, 0), axis=0)
    first_row = tl.sum(tl.where(e < expert, count_E, 0), axis=0)
    tl.store(count_ptr + expert, count)
    tl.store(offset_ptr + expert, first_row + count)

    over = assigned > capacity
    # Without PROBS all priorities are 0, the threshold: all tie, and of ties the earlier stay.
    passes = tl.where(over, DIGIT_PASSES, 0) if PROBS else 0
    threshold, above = _threshold(list_priority_ptr + start, assigned, capacity, passes, BLOCK)
    threshold = tl.where(over, threshold, -1)  # everything lies above -1
    ties_kept = capacity - above
    greater_before, ties_before = 0, 0
    for first in range(0, assigned, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < assigned
        priority = tl.load(list_priority_ptr + start + i, mask=inside, other=-2)
        assignment = tl.load(list_assignment_ptr + start + i, mask=inside, other=0)
        greater = (priority > threshold).to(tl.int32)
        tie = (priority == threshold).to(tl.int32)
        # Two running counts in one scan: 16 bits each.
        both = tl.cumsum(greater + (tie << 16), axis=0)
        greater_rank = greater_before + (both & 0xFFFF) - greater
        tie_rank = ties_before + (both >> 16) - tie
        keep = (greater > 0) | ((tie > 0) & (tie_rank < ties_kept))
        row = first_row + greater_rank + tl.minimum(tie_rank, ties_kept)
        tl.store(row_ptr + assignment, tl.where(keep, row, -1), mask=inside)
        tl.store(token_ptr + row, assignment // K, mask=keep & inside)
        greater_before += tl.sum(greater, axis=0)
        ties_before += tl.sum(tie, axis=0)

    # The experts share the unused rows out.
    for first in range(tl.sum(count_E, axis=0) + expert * BLOCK, R, E * BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(token_ptr + row, tl.full([BLOCK], -1, tl.int32), mask=row < R)
