"""The tensors that the three ops hand to each other: a route, and the order of rows received from other ranks.

Legend: T tokens, E experts, K experts a token, C capacity, R rows of the expert buffers, min(T * K, E * C); L experts
of this rank, W x P senders, M = P * W * L * C rows that are received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from mmkernels.common.errors import KernelArgumentError

DROP_POLICIES = ("probs", "position")
"""Orders of dropping over capacity: the assignments of the lowest probability, or those of the latest tokens."""

Quotas = Callable[[Tensor], Tensor]
"""From `assigned_E`, the assignments of each expert (int32), to how many each may keep (int32 [E]), on the device."""


class Route(NamedTuple):
    """Way of tokens to experts. R is known on the host; kept rows come first, sorted by expert, then by token.

    Attributes:
        weight_TK: fp32, softmax over the chosen logits, kept at its value for dropped assignments too; the one field
            that carries a gradient (to the logits).
        expert_TK: int32, chosen experts, best first; of equal logits the lower expert comes first.
        row_TK: int32, row of each assignment; -1 for a dropped one, and for a token that was not to be routed at all,
            which no count has, and whose experts and weights are 0.
        token_R: int32, token of each row; -1 for an unused row.
        count_E: int32, assignments kept by each expert.
        assigned_E: int32, assignments of each expert before any was dropped.
        offset_E: int32, inclusive cumulative sum of `count_E`: what `F.grouped_mm` takes as `offs`.
        capacity: the most assignments that an expert keeps, a number that the host knows; None where it does not.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    row_TK: Tensor
    token_R: Tensor
    count_E: Tensor
    assigned_E: Tensor
    offset_E: Tensor
    capacity: int | None = None


class ReceivedRows(NamedTuple):
    """Order of received rows by expert, in each group of experts on its own.

    The rows of a group lie together: those of the experts lo to hi - 1 are P * W * C * lo to P * W * C * hi. Numbers
    count from the group's first row.

    Attributes:
        source_M: int32, the received row that comes to each sorted row; -1 past the group's last.
        target_M: int32, the sorted row that each received row goes to; -1 for an empty slot.
        offset_L: int32, the sorted row after each expert's last.
    """

    source_M: Tensor
    target_M: Tensor
    offset_L: Tensor


def static_rows(tokens: int, top_k: int, experts: int, capacity: int | None) -> int:
    """Rows that are enough whatever the router says: no device needs to be asked."""
    assignments = tokens * top_k
    return assignments if capacity is None else min(assignments, experts * capacity)


def ranks_by_probability(drop_policy: str) -> bool:
    """Whether a drop policy ranks assignments by probability; else it ranks them by position.

    Raises:
        KernelArgumentError: there is no such policy.
    """
    if drop_policy not in DROP_POLICIES:
        raise KernelArgumentError("drop_policy", repr(drop_policy), ", ".join(DROP_POLICIES))
    return drop_policy == "probs"
