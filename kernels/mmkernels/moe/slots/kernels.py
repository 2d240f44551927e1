"""Triton kernels of capacity slots: one launch for a sender's rows, one for the rows that are received.

Legend: E experts of all ranks, K experts a token, L experts of this rank, W x P senders; A = T * K assignments, S = L *
P * W segments: an expert's rows from one sender.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["A", "first", "capacity"])
def to_slots_kernel(
    row_ptr,
    expert_ptr,
    offset_ptr,
    count_ptr,
    start_ptr,
    new_row_ptr,
    token_ptr,
    new_count_ptr,
    new_offset_ptr,
    A,
    first,
    capacity,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program moves a block of assignments and clears one expert's empty slots. Grid: max(A / BLOCK, E)."""
    pid = tl.program_id(0)
    a = pid * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + a, mask=a < A, other=-1)
    kept = row >= 0
    expert = tl.load(expert_ptr + a, mask=kept, other=0)
    begin = tl.load(offset_ptr + expert, mask=kept, other=0) - tl.load(count_ptr + expert, mask=kept, other=0)
    number = row - begin - first
    kept = kept & (number >= 0) & (number < capacity)
    new_row = tl.load(start_ptr + expert, mask=kept, other=0) + number
    tl.store(new_row_ptr + a, tl.where(kept, new_row, -1), mask=a < A)
    tl.store(token_ptr + new_row, a // K, mask=kept)
    if pid < E:
        e = tl.arange(0, EP)
        count_E = tl.load(count_ptr + e, mask=e < E, other=0) - first
        count_E = tl.minimum(tl.maximum(count_E, 0), capacity)
        count = tl.sum(tl.where(e == pid, count_E, 0), axis=0)
        tl.store(new_count_ptr + pid, count)
        tl.store(new_offset_ptr + pid, tl.sum(tl.where(e <= pid, count_E, 0), axis=0))
        start = tl.load(start_ptr + pid)
        for begin_c in range(0, capacity, BLOCK):
            c = begin_c + tl.arange(0, BLOCK)
            tl.store(token_ptr + start + c, tl.full([BLOCK], -1, tl.int32), mask=(c >= count) & (c < capacity))


@triton.jit(do_not_specialize=["stride_w", "stride_p", "stride_l", "capacity"])
def sort_received_kernel(
    count_ptr,
    lo_ptr,
    hi_ptr,
    source_ptr,
    target_ptr,
    offset_ptr,
    stride_w,
    stride_p,
    stride_l,
    capacity,
    W: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    SP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program numbers one segment's rows. Grid: L * P * W, in the order in which rows are sorted."""
    pid = tl.program_id(0)
    expert, sender = pid // (P * W), pid % (P * W)
    lo, hi = tl.load(lo_ptr + expert), tl.load(hi_ptr + expert)
    s = tl.arange(0, SP)
    expert_S, sender_S = s // (P * W), s % (P * W)
    at_S = sender_S % W * stride_w + sender_S // W * stride_p + expert_S * stride_l
    group_S = (s < L * P * W) & (expert_S >= lo) & (expert_S < hi)
    count_S = tl.load(count_ptr + at_S, mask=group_S, other=0)
    count = tl.sum(tl.where(s == pid, count_S, 0), axis=0)
    begin = tl.sum(tl.where(s < pid, count_S, 0), axis=0)
    total = tl.sum(count_S, axis=0)
    empty_before = tl.sum(tl.where(group_S & (s < pid), capacity - count_S, 0), axis=0)
    base = lo * (P * W) * capacity
    row = (sender * (hi - lo) + expert - lo) * capacity
    for begin_c in range(0, capacity, BLOCK):
        c = begin_c + tl.arange(0, BLOCK)
        used, inside = c < count, c < capacity
        tl.store(target_ptr + base + row + c, tl.where(used, begin + c, -1), mask=inside)
        # Empty slots of all segments make up what lies past the group's last row.
        to = tl.where(used, begin + c, total + empty_before + c - count)
        tl.store(source_ptr + base + to, tl.where(used, row + c, -1), mask=inside)
    if sender == P * W - 1:
        tl.store(offset_ptr + expert, begin + count)
