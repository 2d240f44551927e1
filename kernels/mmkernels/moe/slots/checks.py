"""Argument checks of capacity slots. They read no values from a device.

Legend: E experts of all ranks, L experts of this rank, W x P senders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.moe.route_types import Route


def check_to_slots(route: Route, start_E: Tensor) -> None:
    """Refuse rows of first slots that are not one an expert of the route.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    if start_E.dtype != torch.int32 or start_E.shape != route.count_E.shape:
        raise KernelArgumentError("start_E", f"{start_E.dtype} {list(start_E.shape)}", "int32, one row an expert")


def check_sort_received(count_WPL: Tensor, backend: str) -> None:
    """Refuse counts of another kind, or an unknown backend; errors as above."""
    if count_WPL.dtype != torch.int32 or count_WPL.ndim != 3:
        raise KernelArgumentError("count_WPL", f"{count_WPL.dtype} {list(count_WPL.shape)}", "int32 [W, P, L]")
    if backend not in ("auto", "triton", "naive"):
        raise KernelArgumentError("backend", repr(backend), "auto, triton, naive")
