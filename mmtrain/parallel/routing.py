"""Routing of tokens that lie on several ranks, as one rank would route them all.

Legend: T tokens of this rank, N tokens of all W ranks, E experts, K experts a token, R rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.moe import Route
from mmtrain.parallel.collectives import gather_alike


class RoutedTogether:
    """The ranks of a group hold consecutive parts of one micro-batch: capacity and fractions are the micro-batch's.

    Logits are small (E numbers a token), so every rank gathers them all and routes them alike.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def gather(self, logits_TE: Tensor) -> Tensor:
        """Logits of all tokens, [N, E]."""
        return gather_alike(logits_TE, self.group)

    def mine(self, plan: Route) -> Route:
        """This rank's part of a plan for N tokens, its rows numbered by expert, then by token."""
        return part_of(plan, dist.get_rank(self.group), dist.get_world_size(self.group))


def part_of(plan: Route, rank: int, ranks: int) -> Route:
    """The plan of one of `ranks` equal parts of the tokens. Nothing waits for the device.

    Rows that a plan numbers by expert, then by token, keep their order in a part: an assignment's new row is how many
    of the part's come before it.
    """
    tokens = plan.slot_TK.shape[0] // ranks
    mine = slice(rank * tokens, (rank + 1) * tokens)
    slot_TK, expert_TK = plan.slot_TK[mine], plan.expert_TK[mine]
    kept_A, expert_A = (slot_TK >= 0).flatten(), expert_TK.flatten().long()
    count_E = torch.zeros_like(plan.count_E).scatter_add_(0, expert_A, kept_A.int())
    wanted_E = torch.zeros_like(plan.count_E).scatter_add_(0, expert_A, torch.ones_like(expert_A, dtype=torch.int32))
    offset_E = count_E.cumsum(0, dtype=torch.int32)
    top_k = expert_TK.shape[1]
    rows = min(tokens * top_k, plan.token_R.shape[0])
    # Sorted by its row in the whole plan, the i-th kept assignment gets row i.
    order_A = torch.where(kept_A, slot_TK.flatten(), plan.token_R.shape[0]).argsort(stable=True)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(order_A.numel(), device=order_A.device)
    new_slot_TK = torch.where(kept_A, place_A, -1).int().view_as(slot_TK)
    token_R = torch.where(torch.arange(rows, device=order_A.device) < offset_E[-1], order_A[:rows] // top_k, -1).int()
    return Route(plan.weight_TK[mine], expert_TK, new_slot_TK, token_R, count_E, wanted_E, offset_E)
