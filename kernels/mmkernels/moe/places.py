"""Fixed places for rows that travel between ranks: whatever the router says, shapes stay, and no host waits.

A sender gives each expert C places in its rows, of which some stay empty. Who gets the rows of several senders sorts
out the empty ones and puts the rest in order of expert.

Legend: T tokens, E experts of all ranks, K experts a token, L experts of this rank, W x P senders, C places of an
expert in a sender's rows, R = E * C rows of a sender, M = P * W * L * C rows that arrive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.common.errors import KernelArgumentError
from mmkernels.moe.layout import Route


class Arrivals(NamedTuple):
    """How rows that arrive are sorted by expert, in each group of experts on its own.

    The rows of a group lie together: those of the experts lo to hi - 1 are P * W * C * lo to P * W * C * hi. Numbers
    count from the group's first row.

    Attributes:
        source_M: int32, the row that comes to each place of the sorted rows; -1 past the group's last.
        place_M: int32, the sorted place of each row; -1 for an empty one.
        offset_L: int32, the sorted place after each expert's last row.
    """

    source_M: Tensor
    place_M: Tensor
    offset_L: Tensor


def to_places(route: Route, start_E: Tensor, first: int, capacity: int, *, backend: str = "auto") -> Route:
    """The route of those assignments that are number `first` to `first + C - 1` of the ones that their expert keeps.

    Args:
        route: result of :func:`mmkernels.moe.route`.
        start_E: int32, row of each expert's first place.
        first: how many of an expert's kept assignments are somebody else's.
        capacity: C.
        backend: "auto" (the kernel on CUDA, else torch), "triton" or "naive".

    Returns:
        A route with R rows for `permute` and `unpermute` with ``clear=False``: kept ones are not the first.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    if start_E.dtype != torch.int32 or start_E.shape != route.count_E.shape:
        raise KernelArgumentError("start_E", f"{start_E.dtype} {list(start_E.shape)}", "int32, one row an expert")
    if not use_triton(backend, "weight_TK", route.weight_TK, others=("naive",)):
        return _naive_to_places(route, start_E, first, capacity)
    from mmkernels.moe.places_triton import triton_to_places

    return triton_to_places(route, start_E, first, capacity)


def sort_arrivals(count_WPL: Tensor, lo_L: Tensor, hi_L: Tensor, capacity: int, *, backend: str = "auto") -> Arrivals:
    """Sort the rows of all senders by expert, then by sender. A group's rows arrive by p, by w, by expert.

    Args:
        count_WPL: int32, how many of a sender's places of an expert are used, always the first; any strides.
        lo_L: int32, the first expert of each expert's group.
        hi_L: int32, the one after its last.
        capacity: C.
        backend: as for :func:`to_places`.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    if count_WPL.dtype != torch.int32 or count_WPL.ndim != 3:
        raise KernelArgumentError("count_WPL", f"{count_WPL.dtype} {list(count_WPL.shape)}", "int32 [W, P, L]")
    if backend not in ("auto", "triton", "naive"):
        raise KernelArgumentError("backend", repr(backend), "auto, triton, naive")
    if backend == "naive" or (backend == "auto" and not count_WPL.is_cuda):
        return _naive_sort_arrivals(count_WPL, lo_L, hi_L, capacity)
    from mmkernels.moe.places_triton import triton_sort_arrivals

    return triton_sort_arrivals(count_WPL, lo_L, hi_L, capacity)


def _naive_to_places(route: Route, start_E: Tensor, first: int, capacity: int) -> Route:
    number_TK = route.slot_TK - (route.offset_E - route.count_E + first)[route.expert_TK.long()]
    kept_TK = (route.slot_TK >= 0) & (number_TK >= 0) & (number_TK < capacity)
    slot_TK = torch.where(kept_TK, start_E[route.expert_TK.long()] + number_TK, -1)
    rows = capacity * start_E.numel()
    token_T1 = torch.arange(slot_TK.shape[0], dtype=torch.int32, device=slot_TK.device)[:, None]
    token_R = torch.full((rows + 1,), -1, dtype=torch.int32, device=slot_TK.device)
    token_R[torch.where(kept_TK, slot_TK, rows).long()] = token_T1.expand_as(slot_TK)
    count_E = (route.count_E - first).clamp(0, capacity)
    return route._replace(slot_TK=slot_TK, token_R=token_R[:rows], count_E=count_E, offset_E=count_E.cumsum(0).int())


def _naive_sort_arrivals(count_WPL: Tensor, lo_L: Tensor, hi_L: Tensor, capacity: int) -> Arrivals:
    ranks, slices, held = count_WPL.shape
    rows, device = ranks * slices * capacity, count_WPL.device
    lo_L, hi_L = lo_L.long(), hi_L.long()
    count_LPW = count_WPL.permute(2, 1, 0).long()
    end_LPW = count_LPW.flatten().cumsum(0).view_as(count_LPW)
    before_L = (end_LPW - count_LPW)[:, 0, 0][lo_L]
    begin_PWL = (end_LPW - count_LPW - before_L[:, None, None]).permute(1, 2, 0)
    number_C = torch.arange(capacity, device=device)
    used_PWLC = number_C < count_WPL.transpose(0, 1)[..., None]
    # Row of each place, from the first of all groups and from the first of its own.
    sender_PW1 = torch.arange(slices * ranks, device=device).view(slices, ranks, 1)
    expert_L = torch.arange(held, device=device)
    row_PWL = (sender_PW1 * (hi_L - lo_L) + expert_L - lo_L) * capacity
    row_PWLC, base_L1 = row_PWL[..., None] + number_C, (lo_L * rows)[:, None]
    place_PWLC = torch.where(used_PWLC, begin_PWL[..., None] + number_C, -1)
    total = held * rows
    place_M = torch.empty(total, dtype=torch.int32, device=device)
    place_M[(row_PWLC + base_L1).flatten()] = place_PWLC.flatten().int()
    source_M = torch.full((total + 1,), -1, dtype=torch.int32, device=device)
    source_M[torch.where(used_PWLC, place_PWLC + base_L1, total).flatten()] = row_PWLC.flatten().int()
    return Arrivals(source_M[:total], place_M, (end_LPW[:, -1, -1] - before_L).int())
