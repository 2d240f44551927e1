"""The definition of capacity slots in plain torch, on any device; the host never waits for it.

Legend: T tokens, E experts of all ranks, K experts a token, L experts of this rank, W x P senders, C slots of an expert
in a sender's rows, R = E * C rows of a sender, M = P * W * L * C rows that are received.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.moe.route_types import ReceivedRows, Route


def naive_to_slots(route: Route, start_E: Tensor, first: int, capacity: int) -> Route:
    """Route to C slots of each expert, as `to_slots`."""
    number_TK = route.row_TK - (route.offset_E - route.count_E + first)[route.expert_TK.long()]
    kept_TK = (route.row_TK >= 0) & (number_TK >= 0) & (number_TK < capacity)
    row_TK = torch.where(kept_TK, start_E[route.expert_TK.long()] + number_TK, -1)
    rows = capacity * start_E.numel()
    token_T1 = torch.arange(row_TK.shape[0], dtype=torch.int32, device=row_TK.device)[:, None]
    token_R = torch.full((rows + 1,), -1, dtype=torch.int32, device=row_TK.device)
    token_R[torch.where(kept_TK, row_TK, rows).long()] = token_T1.expand_as(row_TK)
    count_E = (route.count_E - first).clamp(0, capacity)
    return route._replace(row_TK=row_TK, token_R=token_R[:rows], count_E=count_E, offset_E=count_E.cumsum(0).int())


def naive_sort_received(count_WPL: Tensor, lo_L: Tensor, hi_L: Tensor, capacity: int) -> ReceivedRows:
    """Order of received rows by expert, then by sender, as `sort_received`."""
    ranks, slices, local_experts = count_WPL.shape
    rows, device = ranks * slices * capacity, count_WPL.device
    lo_L, hi_L = lo_L.long(), hi_L.long()
    count_LPW = count_WPL.permute(2, 1, 0).long()
    end_LPW = count_LPW.flatten().cumsum(0).view_as(count_LPW)
    before_L = (end_LPW - count_LPW)[:, 0, 0][lo_L]
    begin_PWL = (end_LPW - count_LPW - before_L[:, None, None]).permute(1, 2, 0)
    number_C = torch.arange(capacity, device=device)
    used_PWLC = number_C < count_WPL.transpose(0, 1)[..., None]
    # Row of each slot, from the first of all groups and from the first of its own.
    sender_PW1 = torch.arange(slices * ranks, device=device).view(slices, ranks, 1)
    expert_L = torch.arange(local_experts, device=device)
    row_PWL = (sender_PW1 * (hi_L - lo_L) + expert_L - lo_L) * capacity
    row_PWLC, base_L1 = row_PWL[..., None] + number_C, (lo_L * rows)[:, None]
    target_PWLC = torch.where(used_PWLC, begin_PWL[..., None] + number_C, -1)
    total = local_experts * rows
    target_M = torch.empty(total, dtype=torch.int32, device=device)
    target_M[(row_PWLC + base_L1).flatten()] = target_PWLC.flatten().int()
    source_M = torch.full((total + 1,), -1, dtype=torch.int32, device=device)
    source_M[torch.where(used_PWLC, target_PWLC + base_L1, total).flatten()] = row_PWLC.flatten().int()
    return ReceivedRows(source_M[:total], target_M, (end_LPW[:, -1, -1] - before_L).int())
