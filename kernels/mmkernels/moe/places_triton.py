"""Fixed places on Triton: one launch for a sender's rows, one for those that arrive.

Legend as in `places.py`; A = T * K assignments, S = L * P * W segments: an expert's rows from one sender.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmkernels.moe.layout import Route
from mmkernels.moe.places import Arrivals

BLOCK, WARPS = 1024, 4
"""Entries that a program writes at a time."""


def triton_to_places(route: Route, start_E: torch.Tensor, first: int, capacity: int) -> Route:
    """See `mmkernels.moe.places.to_places`."""
    experts, assignments = start_E.numel(), route.slot_TK.numel()
    slot_TK, offset_E = torch.empty_like(route.slot_TK), torch.empty_like(route.offset_E)
    token_R = torch.empty(experts * capacity, dtype=torch.int32, device=slot_TK.device)
    count_E = torch.empty_like(route.count_E)
    grid = (max(triton.cdiv(assignments, BLOCK), experts),)
    to_places_kernel[grid](
        route.slot_TK, route.expert_TK, route.offset_E, route.count_E, start_E, slot_TK, token_R, count_E, offset_E,
        assignments, first, capacity,
        E=experts, EP=triton.next_power_of_2(experts), K=slot_TK.shape[1], BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return route._replace(slot_TK=slot_TK, token_R=token_R, count_E=count_E, offset_E=offset_E)


def triton_sort_arrivals(count_WPL: torch.Tensor, lo_L: torch.Tensor, hi_L: torch.Tensor, capacity: int) -> Arrivals:
    """See `mmkernels.moe.places.sort_arrivals`."""
    ranks, slices, held = count_WPL.shape
    segments = ranks * slices * held
    source_M, place_M = (torch.empty(segments * capacity, dtype=torch.int32, device=count_WPL.device) for _ in range(2))
    offset_L = torch.empty(held, dtype=torch.int32, device=count_WPL.device)
    sort_arrivals_kernel[(segments,)](
        count_WPL, lo_L, hi_L, source_M, place_M, offset_L, *count_WPL.stride(), capacity,
        W=ranks, P=slices, L=held, SP=triton.next_power_of_2(segments), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return Arrivals(source_M, place_M, offset_L)


@triton.jit(do_not_specialize=["A", "first", "capacity"])
def to_places_kernel(
    slot_ptr,
    expert_ptr,
    offset_ptr,
    count_ptr,
    start_ptr,
    new_slot_ptr,
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
    """A program moves a block of assignments and clears one expert's empty places. Grid: max(A / BLOCK, E)."""
    pid = tl.program_id(0)
    a = pid * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_ptr + a, mask=a < A, other=-1)
    kept = slot >= 0
    expert = tl.load(expert_ptr + a, mask=kept, other=0)
    begin = tl.load(offset_ptr + expert, mask=kept, other=0) - tl.load(count_ptr + expert, mask=kept, other=0)
    number = slot - begin - first
    kept = kept & (number >= 0) & (number < capacity)
    new_slot = tl.load(start_ptr + expert, mask=kept, other=0) + number
    tl.store(new_slot_ptr + a, tl.where(kept, new_slot, -1), mask=a < A)
    tl.store(token_ptr + new_slot, a // K, mask=kept)
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
def sort_arrivals_kernel(
    count_ptr,
    lo_ptr,
    hi_ptr,
    source_ptr,
    place_ptr,
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
        tl.store(place_ptr + base + row + c, tl.where(used, begin + c, -1), mask=inside)
        # Empty places of all segments make up what lies past the group's last row.
        to = tl.where(used, begin + c, total + empty_before + c - count)
        tl.store(source_ptr + base + to, tl.where(used, row + c, -1), mask=inside)
    if sender == P * W - 1:
        tl.store(offset_ptr + expert, begin + count)
