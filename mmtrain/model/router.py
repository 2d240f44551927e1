"""The router: which experts a token goes to, and which assignments an expert's capacity lets pass.

Legend: T tokens, D model width, E experts, K experts a token, N assignments kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        weight_TK: fp32, softmax over the chosen logits; kept at its value for dropped assignments too.
        expert_TK: int64, chosen experts, best first.
        slot_TK: int64, row of each assignment among the N kept ones sorted by expert; N for a dropped one.
        token_N: int64, token of each kept row.
        count_E: int64, kept assignments of each expert (sums to N).
    """

    weight_TK: Tensor
    expert_TK: Tensor
    slot_TK: Tensor
    token_N: Tensor
    count_E: Tensor


class RouterStats(NamedTuple):
    """What one layer's router did to one micro-batch; all fp32, detached but for the loss.

    Attributes:
        aux_loss: scalar, already times its coefficient, to be added to the loss.
        load_E: assignments wanted of each expert over the even share (1 is balanced).
        drop_rate: scalar, share of assignments dropped.
        entropy: scalar, mean entropy of the router's distribution, in nats.
    """

    aux_loss: Tensor
    load_E: Tensor
    drop_rate: Tensor
    entropy: Tensor


class Router(nn.Module):
    """Top-k routing in fp32 (MiniMax-01 eq. 1 and section 2.1).

    Capacity holds in training mode alone: after `model.eval()` nothing is dropped, as in the released inference code.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.top_k, config.num_experts
        self.capacity_factor, self.drop_policy = config.capacity_factor, config.drop_policy
        self.aux_loss_coef = config.aux_loss_coef
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor) -> tuple[Routing, RouterStats]:
        """Route every token of x [T, D]."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        log_prob_TE = logits_TE.log_softmax(-1)
        prob_TE = log_prob_TE.exp()
        chosen_TK, expert_TK = logits_TE.topk(self.top_k, dim=-1)
        weight_TK = chosen_TK.softmax(-1)
        wanted_E = torch.bincount(expert_TK.flatten(), minlength=self.num_experts)
        factor = self.capacity_factor if self.training else None
        capacity = expert_capacity(x_TD.shape[0], self.top_k, self.num_experts, factor)
        # One chosen expert always weighs 1, which ranks nothing: then the full distribution does.
        priority_TK = weight_TK if self.top_k > 1 else prob_TE.gather(1, expert_TK)
        routing = assign(weight_TK, expert_TK, self.num_experts, capacity, self.drop_policy, priority_TK)
        assignments = max(expert_TK.numel(), 1)
        stats = RouterStats(
            aux_loss=load_balancing_loss(prob_TE, wanted_E, self.top_k) * self.aux_loss_coef,
            load_E=wanted_E * (self.num_experts / assignments),
            drop_rate=1.0 - routing.count_E.sum() / assignments,
            entropy=-(prob_TE.detach() * log_prob_TE.detach()).sum() / max(x_TD.shape[0], 1),
        )
        return routing, stats


def load_balancing_loss(prob_TE: Tensor, wanted_E: Tensor, top_k: int) -> Tensor:
    """E/k * sum_i f_i m_i: f_i assignments to expert i a token (sums to k), m_i its mean probability; 1 is balanced.

    The paper prints (1/E) * sum_i f_i m_i (MiniMax-01 section 2.1): multiply by k/E^2 to get its value. f is taken
    before anything is dropped and carries no gradient. Equal to megatron-core's `switch_load_balancing_loss_func`.
    """
    tokens, experts = max(prob_TE.shape[0], 1), prob_TE.shape[1]
    return (prob_TE.sum(0) * wanted_E).sum() * (experts / (top_k * tokens * tokens))


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: float | None) -> int | None:
    """Assignments one expert takes: ceil(T * k / E * factor), rounded in megatron-core's order; None drops nothing."""
    return None if factor is None else math.ceil(tokens * top_k / num_experts * factor)


def assign(
    weight_TK: Tensor,
    expert_TK: Tensor,
    num_experts: int,
    capacity: int | None,
    policy: str,
    priority_TK: Tensor | None = None,
) -> Routing:
    """Sort assignments by expert and drop those over capacity.

    Over capacity the lowest priorities go first (`probs`; the weights unless given; equal ones by position) or the
    latest tokens (`position`). A dropped assignment adds nothing; the token's other weights are not renormalised.
    """
    expert_A = expert_TK.flatten()
    if capacity is not None and policy == "probs":
        priority_A = (weight_TK if priority_TK is None else priority_TK).detach().flatten()
        ranked_A = priority_A.argsort(descending=True, stable=True)
        order_A = ranked_A[expert_A[ranked_A].argsort(stable=True)]
    else:
        order_A = expert_A.argsort(stable=True)
    wanted_E = torch.bincount(expert_A, minlength=num_experts)
    count_E = wanted_E if capacity is None else wanted_E.clamp(max=capacity)
    if capacity is not None:
        sorted_expert_A = expert_A[order_A]
        rank_A = torch.arange(order_A.numel(), device=order_A.device) - (wanted_E.cumsum(0) - wanted_E)[sorted_expert_A]
        order_A = order_A[rank_A < capacity]
    slot_A = torch.full_like(expert_A, order_A.numel())
    slot_A[order_A] = torch.arange(order_A.numel(), device=order_A.device)
    return Routing(weight_TK, expert_TK, slot_A.view_as(expert_TK), order_A // expert_TK.shape[1], count_E)
