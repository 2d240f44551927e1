"""The definition of routing in plain torch, on any device, differentiated by autograd.

It never waits for the device: what is unknown on the host stays a tensor, and shapes are static.

Legend: T tokens, E experts, K experts a token, A = T * K assignments, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.moe.route_types import Quotas, Route, ranks_by_probability, static_rows


def naive_route(
    logits_TE: Tensor,
    top_k: int,
    capacity: int | None = None,
    drop_policy: str = "probs",
    quotas: Quotas | None = None,
) -> Route:
    """Experts, weights and rows of each token, as `mmkernels.moe.route`; weights keep any floating dtype of logits."""
    # A stable sort takes the lower expert of equal logits, which torch.topk does not promise. NaN counts as greatest.
    expert_TK = logits_TE.detach().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
    # One chosen expert always weighs 1, which ranks nothing: then the full distribution does.
    priority_TK = weight_TK if top_k > 1 else logits_TE.softmax(-1).gather(1, expert_TK)
    ranking = priority_TK if ranks_by_probability(drop_policy) else None
    return naive_assign(weight_TK, expert_TK, logits_TE.shape[1], capacity, ranking, quotas)


def naive_assign(
    weight_TK: Tensor,
    expert_TK: Tensor,
    experts: int,
    capacity: int | None,
    priority_TK: Tensor | None,
    quotas: Quotas | None = None,
) -> Route:
    """Drop what is over capacity and number the rest by expert, then by token.

    Args:
        weight_TK: passed on to the result.
        expert_TK: chosen experts, an integer dtype.
        experts: E.
        capacity: assignments an expert takes, or None.
        priority_TK: over capacity the lowest go first, of equal ones the latest; None drops the latest tokens.
        quotas: each expert's own capacity, given `assigned_E`.
    """
    expert_A = expert_TK.flatten().long()
    position_A = torch.arange(expert_A.numel(), device=expert_A.device)
    assigned_E = expert_A.new_zeros(experts).scatter_add_(0, expert_A, torch.ones_like(expert_A))
    by_position_A = expert_A.argsort(stable=True)
    keep_A = torch.ones_like(expert_A, dtype=torch.bool)
    quota_E = None if quotas is None else quotas(assigned_E.int()).long()
    if capacity is not None:
        quota_E = assigned_E.new_full((experts,), capacity)
    if quota_E is not None:
        order_A = by_position_A
        if priority_TK is not None:
            ranked_A = priority_TK.detach().flatten().argsort(descending=True, stable=True)
            order_A = ranked_A[expert_A[ranked_A].argsort(stable=True)]
        rank_A = position_A - (assigned_E.cumsum(0) - assigned_E)[expert_A[order_A]]
        keep_A[order_A] = rank_A < quota_E[expert_A[order_A]]

    kept_A = keep_A[by_position_A]
    sorted_row_A = kept_A.cumsum(0) - 1
    row_A = torch.empty_like(expert_A)
    row_A[by_position_A] = torch.where(kept_A, sorted_row_A, -1)
    rows = static_rows(*expert_TK.shape, experts, capacity)
    token_R = expert_A.new_full((rows + 1,), -1)  # dropped assignments go to the last row, which is cut off
    token_R[torch.where(keep_A, row_A, rows)] = torch.where(keep_A, position_A // expert_TK.shape[1], -1)
    count_E = assigned_E if quota_E is None else torch.minimum(assigned_E, quota_E)
    integers = (expert_TK, row_A.view_as(expert_TK), token_R[:rows], count_E, assigned_E, count_E.cumsum(0))
    return Route(weight_TK, *(x.int() for x in integers), capacity)
