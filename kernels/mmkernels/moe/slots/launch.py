"""Capacity slots through the Triton kernels, with the launch shapes (all tunables are here).

Legend: T tokens, E experts of all ranks, K experts a token, L experts of this rank, W x P senders, R rows of a sender,
M rows that are received.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.moe.route_types import ReceivedRows, Route
from mmkernels.moe.slots.kernels import sort_received_kernel, to_slots_kernel

BLOCK, WARPS = 1024, 4
"""Entries that a program writes at a time."""


def triton_to_slots(route: Route, start_E: Tensor, first: int, capacity: int) -> Route:
    """Route to C slots of each expert: the backend "triton" of `to_slots`, which has checked the arguments."""
    experts, assignments = start_E.numel(), route.row_TK.numel()
    row_TK, offset_E = torch.empty_like(route.row_TK), torch.empty_like(route.offset_E)
    token_R = torch.empty(experts * capacity, dtype=torch.int32, device=row_TK.device)
    count_E = torch.empty_like(route.count_E)
    grid = (max(triton.cdiv(assignments, BLOCK), experts),)
    to_slots_kernel[grid](
        route.row_TK, route.expert_TK, route.offset_E, route.count_E, start_E, row_TK, token_R, count_E, offset_E,
        assignments, first, capacity,
        E=experts, EP=triton.next_power_of_2(experts), K=row_TK.shape[1], BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return route._replace(row_TK=row_TK, token_R=token_R, count_E=count_E, offset_E=offset_E)


def triton_sort_received(count_WPL: Tensor, lo_L: Tensor, hi_L: Tensor, capacity: int) -> ReceivedRows:
    """Order of received rows: the backend "triton" of `sort_received`, which has checked the arguments."""
    ranks, slices, local_experts = count_WPL.shape
    segments = ranks * slices * local_experts
    like = {"dtype": torch.int32, "device": count_WPL.device}
    source_M, target_M = (torch.empty(segments * capacity, **like) for _ in range(2))
    offset_L = torch.empty(local_experts, **like)
    sort_received_kernel[(segments,)](
        count_WPL, lo_L, hi_L, source_M, target_M, offset_L, *count_WPL.stride(), capacity,
        W=ranks, P=slices, L=local_experts, SP=triton.next_power_of_2(segments), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return ReceivedRows(source_M, target_M, offset_L)
