"""What routing decides: which row of which expert every assignment gets.

Legend: T tokens, E experts, K experts a token, C capacity, R rows of the expert buffers, min(T * K, E * C).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Quotas = Callable[[Tensor], Tensor]
"""From how many assignments want each expert (int32 [E]) to how many it may keep (int32 [E]), on the device."""


class Route(NamedTuple):
    """Where tokens go. R is known on the host; kept rows come first, sorted by expert, then by token.

    Attributes:
        weight_TK: fp32, softmax over the chosen logits, kept at its value for dropped assignments too; the one field
            that carries a gradient (to the logits).
        expert_TK: int32, chosen experts, best first; of equal logits the lower expert comes first.
        slot_TK: int32, row of each assignment; -1 for a dropped one.
        token_R: int32, token of each row; -1 for an unused row.
        count_E: int32, assignments kept by each expert.
        wanted_E: int32, assignments of each expert before any was dropped.
        offset_E: int32, inclusive cumulative sum of `count_E`: what `F.grouped_mm` takes as `offs`.
        capacity: what no expert keeps more of, a number that the host knows; None where it does not.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    slot_TK: Tensor
    token_R: Tensor
    count_E: Tensor
    wanted_E: Tensor
    offset_E: Tensor
    capacity: int | None = None


def static_rows(tokens: int, top_k: int, experts: int, capacity: int | None) -> int:
    """Rows that are enough whatever the router says: no device needs to be asked."""
    assignments = tokens * top_k
    return assignments if capacity is None else min(assignments, experts * capacity)
