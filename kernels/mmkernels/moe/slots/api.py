"""The public functions of capacity slots, for rows that travel between ranks: checks and dispatch.

A sender gives each expert C slots in its rows, of which some stay empty: whatever the router says, shapes stay, and no
host waits. Whoever receives the rows of several senders sorts out the empty ones and puts the rest in order of expert.

Legend: T tokens, E experts of all ranks, K experts a token, L experts of this rank, W x P senders, C slots of an expert
in a sender's rows, R = E * C rows of a sender, M = P * W * L * C rows that are received.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.moe.route_types import ReceivedRows, Route
from mmkernels.moe.slots.checks import check_sort_received, check_to_slots
from mmkernels.moe.slots.naive import naive_sort_received, naive_to_slots


def to_slots(route: Route, start_E: Tensor, first: int, capacity: int, *, backend: str = "auto") -> Route:
    """Route of the assignments `first` to `first + C - 1` of each expert, counted among its kept ones, to C slots each.

    Args:
        route: result of :func:`mmkernels.moe.route`.
        start_E: int32, row of each expert's first slot.
        first: kept assignments of each expert to leave out, which another call takes.
        capacity: C.
        backend: "auto" (the kernel on CUDA, else torch), "triton" or "naive".

    Returns:
        A route with R rows for `permute` and `unpermute` with ``clear=False``: kept ones are not the first.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_to_slots(route, start_E)
    if not use_triton(backend, "weight_TK", route.weight_TK, others=("naive",)):
        return naive_to_slots(route, start_E, first, capacity)
    from mmkernels.moe.slots.launch import triton_to_slots

    return triton_to_slots(route, start_E, first, capacity)


def sort_received(
    count_WPL: Tensor, lo_L: Tensor, hi_L: Tensor, capacity: int, *, backend: str = "auto"
) -> ReceivedRows:
    """Order of the rows of all senders by expert, then by sender.

    The rows of a group of experts are received by p, by w, by expert, in this order.

    Args:
        count_WPL: int32, how many of a sender's slots of an expert are used, always the first; any strides.
        lo_L: int32, the first expert of each expert's group.
        hi_L: int32, the expert after its group's last.
        capacity: C.
        backend: as for :func:`to_slots`.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_sort_received(count_WPL, backend)
    if backend == "naive" or (backend == "auto" and not count_WPL.is_cuda):
        return naive_sort_received(count_WPL, lo_L, hi_L, capacity)
    from mmkernels.moe.slots.launch import triton_sort_received

    return triton_sort_received(count_WPL, lo_L, hi_L, capacity)
