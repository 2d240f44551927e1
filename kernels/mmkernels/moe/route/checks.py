"""Argument checks of routing. They read no values from a device.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import check_matrix
from mmkernels.common.errors import KernelArgumentError
from mmkernels.moe.route_types import Quotas, ranks_by_probability

MAX_EXPERTS = 1024
"""One program of the routing kernels holds all logits of a token."""
MAX_ASSIGNMENTS = 2**30
"""Assignments and rows are numbered in int32, with room for sums of two."""


def check_route(
    logits_TE: Tensor, top_k: int, capacity: int | None, drop_policy: str, quotas: Quotas | None = None
) -> None:
    """Refuse arguments that `route` cannot take.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_matrix("logits_TE", logits_TE, "[T, E]", (torch.float32,))
    tokens, experts = logits_TE.shape
    if not 1 <= experts <= MAX_EXPERTS:
        raise KernelArgumentError("logits_TE", f"{experts} experts", f"1 to {MAX_EXPERTS}")
    _check_int("top_k", top_k, 1)
    if top_k > experts:
        raise KernelArgumentError("top_k", top_k, f"at most the number of experts, {experts}")
    if tokens * top_k >= MAX_ASSIGNMENTS:
        raise KernelArgumentError("logits_TE", f"{tokens} tokens * top_k {top_k}", "fewer than 2^30 assignments")
    if capacity is not None:
        _check_int("capacity", capacity, 1)
        if quotas is not None:
            raise KernelArgumentError("quotas", "a function", f"None with capacity {capacity}: give one of them")
    ranks_by_probability(drop_policy)  # refuses an unknown policy


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise KernelArgumentError(name, f"{value!r} of type {type(value).__name__}", "an int")
    if value < least:
        raise KernelArgumentError(name, value, f"at least {least}")
