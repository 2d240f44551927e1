"""Which rows travel for which group of experts, and how those that arrive are sorted by expert.

A rank's experts are cut into groups, so that rows of one group travel while another is multiplied. Cut by experts, not
by tokens, no expert's products get smaller, and no weight's gradient has to be summed over groups. Only where a rank
has fewer experts than groups is each expert's list of tokens cut too: its parts then count as experts of their own.

A sender's rows lie by group, then by rank that receives them, then by expert. They are of exact size, which every host
has to know, or an expert has a fixed number of places, of which some stay empty: then no host waits for its device.

Legend: E experts of all ranks, L experts of this rank, G groups, W ranks along ep, P ranks along etp, C places of one
expert for one sender, R rows to send, M rows that arrive, S the same sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.moe import Arrivals, Route, sort_arrivals


@dataclass(frozen=True)
class Group:
    """A group's experts and rows, as the host knows them.

    Attributes:
        experts: of those of this rank.
        rows: of the sender's buffer.
        send: rows to each rank along ep; None, like `receive`, for equal parts.
        receive: rows from each rank along ep.
        arriving: sum of `receive`.
        padded: rows that each rank along etp brings together, at least `arriving`.
    """

    experts: slice
    rows: slice
    send: list[int] | None
    receive: list[int] | None
    arriving: int
    padded: int


def cut(held: int, groups: int) -> list[slice]:
    """Cut a rank's experts into `groups` parts of which the first and the last are the smaller ones.

    Nothing is multiplied while the rows of the first group travel there, nor while those of the last travel back.
    """
    ends = held // groups if groups < 3 else max(1, round(held / (3 * (groups - 2) + 2)))
    inner = max(groups - 2, 0)
    sizes = [ends] * min(groups, 2)
    left = held - sum(sizes)
    if inner:
        sizes[1:1] = [left // inner + (i < left % inner) for i in range(inner)]
    else:
        sizes[0] += left
    ends_at = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends_at, sizes, strict=True)]


def parts_of(held: int, groups: int) -> int:
    """Parts that each of a rank's experts is cut into, so that there are as many groups."""
    return -(-groups // held)


def in_parts(plan: Route, parts: int) -> Route:
    """The same plan with each expert's kept tokens cut into parts, which count as experts: E * parts of them.

    Rows stay where they are, as a part has consecutive ones. Nothing waits for the device.
    """
    if parts == 1:
        return plan
    capacity = None if plan.capacity is None else -(-plan.capacity // parts)
    # A part's share of the expert's places, or where there are none, of its tokens.
    wide_E = (plan.count_E + (parts - 1)) // parts if capacity is None else torch.full_like(plan.count_E, capacity)
    part_P = torch.arange(parts, dtype=torch.int32, device=wide_E.device)
    left_EP = (plan.count_E[:, None] - part_P * wide_E[:, None]).clamp(min=0)
    count_V = torch.minimum(left_EP, wide_E[:, None]).flatten()
    expert_TK = plan.expert_TK.long()
    number_TK = (plan.slot_TK - (plan.offset_E - plan.count_E)[expert_TK]).clamp(min=0)  # of a dropped one: any
    part_TK = number_TK // wide_E[expert_TK].clamp(min=1)
    expert_TK = (expert_TK * parts + part_TK).int()
    return plan._replace(expert_TK=expert_TK, count_E=count_V, offset_E=count_V.cumsum(0).int(), capacity=capacity)


class Places:
    """Fixed places: whatever the router says, an expert has `capacity` of them for each sender.

    Attributes:
        start_E: int32, the row of each expert's first place in a sender's rows.
    """

    def __init__(self, ranks: int, slices: int, cuts: Sequence[slice], capacity: int, device: torch.device) -> None:
        """Lay the rows out once, for W `ranks` and P `slices`."""
        self.capacity, self.senders, self.groups = capacity, ranks * slices, []
        start_WL = torch.empty(ranks, cuts[-1].stop, dtype=torch.int32)
        bound_2L = torch.empty(2, cuts[-1].stop, dtype=torch.int32)
        for part in cuts:
            size = part.stop - part.start
            first, number = ranks * part.start * capacity, ranks * size * capacity
            self.groups.append(Group(part, slice(first, first + number), None, None, number, number))
            start_WL[:, part] = first + torch.arange(ranks * size).view(ranks, size).int() * capacity
            bound_2L[0, part], bound_2L[1, part] = part.start, part.stop
        self.start_E, (self.lo_L, self.hi_L) = start_WL.flatten().to(device), bound_2L.to(device)

    def sortings(self, count_WPL: Tensor) -> list[Arrivals]:
        """Sort each group's rows, by expert and by rank that they come from.

        Args:
            count_WPL: rows of each expert here from each rank, int32 on the device.
        """
        source_M, place_M, offset_L = sort_arrivals(count_WPL, self.lo_L, self.hi_L, self.capacity)
        sortings = []
        for group in self.groups:
            rows = slice(*(self.senders * self.capacity * at for at in (group.experts.start, group.experts.stop)))
            sortings.append(Arrivals(source_M[rows], place_M[rows], offset_L[group.experts]))
        return sortings


def exact_groups(
    count_WPWL: Tensor, cuts: Sequence[slice], rank: int, part: int, device: torch.device
) -> tuple[list[Group], list[Arrivals]]:
    """Groups whose rows are as many as there are.

    Args:
        count_WPWL: rows of each sender (along ep, along etp) for each receiver's experts, int64 on the host.
        cuts: the groups' experts.
        rank: of this process along ep.
        part: of this process along etp.
        device: where the rows will be.
    """
    groups, sortings, first = [], [], 0
    for experts in cuts:
        count = count_WPWL[..., experts]
        send, receive = count[rank, part].sum(-1).tolist(), count[:, part, rank].sum(-1).tolist()
        segments_PWL = count[:, :, rank].transpose(0, 1)
        padded = int(segments_PWL.sum((1, 2)).max())
        groups.append(Group(experts, slice(first, first + sum(send)), send, receive, sum(receive), padded))
        sortings.append(_sort(segments_PWL, padded, device))
        first += sum(send)
    return groups, sortings


def _sort(segments_PWL: Tensor, padded: int, device: torch.device) -> Arrivals:
    """Sort rows of which each block of W * L segments fills `padded` at most."""
    blocks, ranks, held = segments_PWL.shape
    total = blocks * padded
    expert_WL = torch.arange(held).expand(ranks, held)
    owner_M = torch.full((total,), held, dtype=torch.int64)
    for block in range(blocks):
        counts = segments_PWL[block].flatten()
        owner_M[block * padded : block * padded + int(counts.sum())] = expert_WL.flatten().repeat_interleave(counts)
    order, used = owner_M.argsort(stable=True), int(segments_PWL.sum())
    place_M = torch.full((total,), -1, dtype=torch.int32)
    place_M[order[:used]] = torch.arange(used, dtype=torch.int32)
    source_S = torch.where(torch.arange(total) < used, order, -1).int()
    offset_L = segments_PWL.sum((0, 1)).cumsum(0).int()
    return Arrivals(source_S.to(device), place_M.to(device), offset_L.to(device))
