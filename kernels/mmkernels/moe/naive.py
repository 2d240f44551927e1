"""The definition of routing, permute and unpermute in plain torch, on any device, differentiated by autograd.

It never waits for the device: what is unknown on the host stays a tensor, and shapes are static.

Legend: T tokens, D model width, E experts, K experts a token, A = T * K assignments, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.moe.layout import Quotas, Route, static_rows


def naive_route(
    logits_TE: Tensor,
    top_k: int,
    capacity: int | None = None,
    drop_policy: str = "probs",
    quotas: Quotas | None = None,
) -> Route:
    """See `mmkernels.moe.route`; takes any floating dtype, which the weights keep."""
    # A stable sort takes the lower expert of equal logits, which torch.topk does not promise. NaN counts as greatest.
    expert_TK = logits_TE.detach().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
    # One chosen expert always weighs 1, which ranks nothing: then the full distribution does.
    priority_TK = weight_TK if top_k > 1 else logits_TE.softmax(-1).gather(1, expert_TK)
    ranking = priority_TK if drop_policy == "probs" else None
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
        quotas: each expert's own capacity, given what is wanted.
    """
    expert_A = expert_TK.flatten().long()
    position_A = torch.arange(expert_A.numel(), device=expert_A.device)
    wanted_E = expert_A.new_zeros(experts).scatter_add_(0, expert_A, torch.ones_like(expert_A))
    by_position_A = expert_A.argsort(stable=True)
    keep_A = torch.ones_like(expert_A, dtype=torch.bool)
    quota_E = None if quotas is None else quotas(wanted_E.int()).long()
    if capacity is not None:
        quota_E = wanted_E.new_full((experts,), capacity)
    if quota_E is not None:
        order_A = by_position_A
        if priority_TK is not None:
            ranked_A = priority_TK.detach().flatten().argsort(descending=True, stable=True)
            order_A = ranked_A[expert_A[ranked_A].argsort(stable=True)]
        rank_A = position_A - (wanted_E.cumsum(0) - wanted_E)[expert_A[order_A]]
        keep_A[order_A] = rank_A < quota_E[expert_A[order_A]]

    kept_A = keep_A[by_position_A]
    row_A = kept_A.cumsum(0) - 1
    slot_A = torch.empty_like(expert_A)
    slot_A[by_position_A] = torch.where(kept_A, row_A, -1)
    rows = static_rows(*expert_TK.shape, experts, capacity)
    token_R = expert_A.new_full((rows + 1,), -1)  # dropped assignments go to the last row, which is cut off
    token_R[torch.where(keep_A, slot_A, rows)] = torch.where(keep_A, position_A // expert_TK.shape[1], -1)
    count_E = wanted_E if quota_E is None else torch.minimum(wanted_E, quota_E)
    integers = (expert_TK, slot_A.view_as(expert_TK), token_R[:rows], count_E, wanted_E, count_E.cumsum(0))
    return Route(weight_TK, *(x.int() for x in integers), capacity)


def naive_permute(x_TD: Tensor, route: Route) -> Tensor:
    """See `mmkernels.moe.permute`; any floating dtype."""
    return x_TD.index_select(0, route.token_R.clamp(min=0)).masked_fill_(route.token_R[:, None] < 0, 0)


def naive_unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route) -> Tensor:
    """See `mmkernels.moe.unpermute`; any floating dtype, summed in fp32 or wider."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    out_TD = y_RD.new_zeros(route.slot_TK.shape[0], y_RD.shape[1], dtype=wide)
    for weight_T, slot_T in zip(weight_TK.unbind(1), route.slot_TK.unbind(1), strict=True):
        product_TD = y_RD.index_select(0, slot_T.clamp(min=0)).to(wide) * weight_T.to(wide)[:, None]
        out_TD += product_TD.masked_fill_(slot_T[:, None] < 0, 0)
    return out_TD.to(y_RD.dtype)
