"""Token groups: which rows travel for which experts, and how received rows are sorted by expert.

A rank's experts are split into groups, so that rows of one group travel while another is multiplied. Split by experts,
not by tokens, no expert's products get smaller, and no weight's gradient has to be summed over groups. Only where a
rank has fewer experts than groups is each expert's list of tokens split too: its chunks then count as experts of their
own.

A sender's rows lie by group, then by rank that receives them, then by expert. They are of exact size, which every host
has to know, or an expert has a fixed number of slots, of which some stay empty: then no host waits for its device.

Legend: E experts of all ranks, L experts of this rank, G chunks of one expert, V chunks of all experts, T tokens, K
experts a token, W ranks along ep, P ranks along etp, C slots of one expert for one sender, R rows to send, M rows
received, S received rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.moe import ReceivedRows, Route, sort_received


@dataclass(frozen=True)
class TokenGroup:
    """The experts and rows of one group, as the host knows them.

    Attributes:
        experts: range of this rank's experts (or chunks of experts) that the group multiplies.
        rows: range of the sender's buffer that holds the group's rows.
        send_counts: rows to each rank along ep; None, like `receive_counts`, for equal parts.
        receive_counts: rows from each rank along ep.
        received: sum of `receive_counts`.
        padded: rows that each rank along etp brings together, at least `received`.
    """

    experts: slice
    rows: slice
    send_counts: list[int] | None
    receive_counts: list[int] | None
    received: int
    padded: int


def split_experts(local_experts: int, token_groups: int) -> list[slice]:
    """Split a rank's experts into groups of which the first and the last are the smaller ones.

    Nothing is multiplied while the rows of the first group travel there, nor while those of the last travel back.
    """
    ends = local_experts // token_groups
    if token_groups >= 3:
        ends = max(1, round(local_experts / (3 * (token_groups - 2) + 2)))
    inner = max(token_groups - 2, 0)
    sizes = [ends] * min(token_groups, 2)
    left = local_experts - sum(sizes)
    if inner:
        sizes[1:1] = [left // inner + (i < left % inner) for i in range(inner)]
    else:
        sizes[0] += left
    ends_at = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends_at, sizes, strict=True)]


def chunks_per_expert(local_experts: int, token_groups: int) -> int:
    """Chunks that the tokens of each of a rank's experts are split into, so that there are as many as groups."""
    return -(-token_groups // local_experts)


def split_into_chunks(plan: Route, chunks: int) -> Route:
    """The plan with each expert's kept tokens split into chunks, which count as experts: E * chunks of them.

    Rows stay where they are, as a chunk has consecutive ones. Nothing waits for the device.
    """
    if chunks == 1:
        return plan
    capacity = None if plan.capacity is None else -(-plan.capacity // chunks)
    # A chunk's share of the expert's slots, or where there are none, of its tokens.
    wide_E = (plan.count_E + (chunks - 1)) // chunks if capacity is None else torch.full_like(plan.count_E, capacity)
    chunk_G = torch.arange(chunks, dtype=torch.int32, device=wide_E.device)
    left_EG = (plan.count_E[:, None] - chunk_G * wide_E[:, None]).clamp(min=0)
    count_V = torch.minimum(left_EG, wide_E[:, None]).flatten()
    expert_TK = plan.expert_TK.long()
    number_TK = (plan.row_TK - (plan.offset_E - plan.count_E)[expert_TK]).clamp(min=0)  # of a dropped one: any
    chunk_TK = number_TK // wide_E[expert_TK].clamp(min=1)
    expert_TK = (expert_TK * chunks + chunk_TK).int()
    return plan._replace(expert_TK=expert_TK, count_E=count_V, offset_E=count_V.cumsum(0).int(), capacity=capacity)


def send_order(ranks: int, local_experts: int, splits: Sequence[slice]) -> Tensor:
    """Experts in the order in which their rows are sent: by group, then by receiver, int64 [E]."""
    expert_WL = torch.arange(ranks * local_experts).view(ranks, local_experts)
    return torch.cat([expert_WL[:, split].flatten() for split in splits])


def reorder_rows(plan: Route, order_E: Tensor) -> Route:
    """The plan with its rows sorted by the experts' position in `order_E`, then by token."""
    sorted_E = plan.count_E[order_E]
    begin_E = torch.empty_like(sorted_E)
    begin_E[order_E] = sorted_E.cumsum(0, dtype=torch.int32) - sorted_E
    shift_E = begin_E - (plan.offset_E - plan.count_E)
    row_TK = torch.where(plan.row_TK >= 0, plan.row_TK + shift_E[plan.expert_TK.long()], -1).int()
    rows, number_T = plan.token_R.shape[0], torch.arange(row_TK.shape[0], dtype=torch.int32, device=row_TK.device)
    token_R = torch.full((rows + 1,), -1, dtype=torch.int32, device=row_TK.device)
    token_R[torch.where(row_TK >= 0, row_TK, rows).long()] = number_T[:, None].expand_as(row_TK)
    return plan._replace(row_TK=row_TK, token_R=token_R[:rows])


class SlotLayout:
    """Rows of fixed slots: whatever the router says, an expert has `capacity` of them for each sender.

    Attributes:
        groups: the token groups.
        start_E: int32, the row of each expert's first slot in a sender's rows.

    Args:
        ranks: W.
        slices: P, or 1 if rows do not travel along etp.
        splits: each group's experts.
        capacity: C.
        device: where the rows will be.
    """

    def __init__(self, ranks: int, slices: int, splits: Sequence[slice], capacity: int, device: torch.device) -> None:
        self.capacity, self.senders = capacity, ranks * slices
        self.groups: list[TokenGroup] = []
        start_WL = torch.empty(ranks, splits[-1].stop, dtype=torch.int32)
        bound_2L = torch.empty(2, splits[-1].stop, dtype=torch.int32)
        for split in splits:
            size = split.stop - split.start
            first, number = ranks * split.start * capacity, ranks * size * capacity
            self.groups.append(TokenGroup(split, slice(first, first + number), None, None, number, number))
            start_WL[:, split] = first + torch.arange(ranks * size).view(ranks, size).int() * capacity
            bound_2L[0, split], bound_2L[1, split] = split.start, split.stop
        self.start_E, (self._lo_L, self._hi_L) = start_WL.flatten().to(device), bound_2L.to(device)

    def sort_received(self, count_WPL: Tensor) -> list[ReceivedRows]:
        """Order of each group's received rows by expert, then by rank that they come from.

        Args:
            count_WPL: rows of each expert here from each rank, int32 on the device.
        """
        source_M, target_M, offset_L = sort_received(count_WPL, self._lo_L, self._hi_L, self.capacity)
        received = []
        for group in self.groups:
            rows = slice(*(self.senders * self.capacity * at for at in (group.experts.start, group.experts.stop)))
            received.append(ReceivedRows(source_M[rows], target_M[rows], offset_L[group.experts]))
        return received


def exact_groups(
    count_WPWL: Tensor, host_WPWL: Tensor, splits: Sequence[slice], ep_rank: int, etp_rank: int
) -> tuple[list[TokenGroup], list[ReceivedRows]]:
    """Token groups whose rows are as many as there are, and the order of each group's received rows by expert.

    The host makes numbers of rows alone; the order of rows is made on the device, which nobody waits for.

    Args:
        count_WPWL: rows of each sender (along ep, along etp) for each receiver's experts, int32 where the rows will be.
        host_WPWL: the same, int64 on the host.
        splits: each group's experts.
        ep_rank: of this process along ep.
        etp_rank: of this process along etp.
    """
    groups, received, first = [], [], 0
    for experts in splits:
        count = host_WPWL[..., experts]
        send, receive = count[ep_rank, etp_rank].sum(-1).tolist(), count[:, etp_rank, ep_rank].sum(-1).tolist()
        padded = int(count[:, :, ep_rank].sum((0, 2)).max())
        groups.append(TokenGroup(experts, slice(first, first + sum(send)), send, receive, sum(receive), padded))
        received.append(sort_exact(count_WPWL[:, :, ep_rank, experts].transpose(0, 1), padded))
        first += sum(send)
    return groups, received


def sort_exact(count_PWL: Tensor, padded: int) -> ReceivedRows:
    """Order by expert of rows received in P blocks of `padded`, each filled from its beginning by sender, by expert.

    Rows of an expert stay in the order in which they came. Nothing waits for the device.

    Args:
        count_PWL: rows of each expert here from each sender, int32; any strides.
        padded: at least the rows of every block.
    """
    blocks, device = count_PWL.shape[0], count_PWL.device
    total = blocks * padded
    filled_PV = count_PWL.flatten(1).cumsum(1)  # V = W L
    begin_PWL = (filled_PV + padded * torch.arange(blocks, device=device)[:, None]).view_as(count_PWL) - count_PWL
    # Segments, an expert's rows from one sender, in the order in which they are sorted.
    count_LPW, begin_LPW = count_PWL.permute(2, 0, 1), begin_PWL.permute(2, 0, 1)
    end_LPW = count_LPW.flatten().cumsum(0).view_as(count_LPW)
    shift_A = (begin_LPW - end_LPW + count_LPW).flatten()  # A = L P W
    place_M = torch.arange(total, device=device)
    segment_M = torch.searchsorted(end_LPW.flatten(), place_M, right=True).clamp(max=shift_A.numel() - 1)
    source_M = torch.where(place_M < end_LPW[-1, -1, -1], place_M + shift_A[segment_M], -1)
    target_M = torch.full((total + 1,), -1, dtype=torch.int32, device=device)
    target_M[torch.where(source_M < 0, total, source_M)] = place_M.int()
    return ReceivedRows(source_M.int(), target_M[:total], end_LPW[:, -1, -1].int())
