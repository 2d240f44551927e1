"""The router: which experts a token goes to, and which assignments an expert's capacity lets pass.

Legend: T tokens, N tokens of the micro-batch (T unless they lie on several ranks), D model width, E experts, K experts
of a token.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.moe import Quotas, Route, route
from mmtrain.config import ModelConfig


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


class TokenShare(Protocol):
    """Which tokens of a micro-batch the router sees, and which of them are its own."""

    def gather(self, logits_TE: Tensor) -> Tensor:
        """Logits of all tokens that are routed together, [N, E], given this rank's."""

    def mine(self, plan: Route) -> Route:
        """This rank's tokens of a plan for all N."""


class OwnTokens:
    """All tokens of the micro-batch lie here."""

    def gather(self, logits_TE: Tensor) -> Tensor:
        """See :class:`TokenShare`."""
        return logits_TE

    def mine(self, plan: Route) -> Route:
        """See :class:`TokenShare`."""
        return plan


class CapacityPool(Protocol):
    """Shares capacity out among micro-batches."""

    def quotas(self, capacity: int) -> Quotas:
        """For `route`: what this micro-batch may keep of each expert, where each alone would have `capacity`."""


class Router(nn.Module):
    """Top-k routing in fp32 (MiniMax-01 eq. 1 and section 2.1).

    Capacity holds in training mode alone: after `model.eval()` nothing is dropped, as in the released inference code.

    Attributes:
        tokens: tokens of the micro-batch that lie elsewhere.
        pool: shares capacity with other micro-batches; None: each has its own.
        parts: equal parts of the micro-batch (its rows) that the auxiliary loss is the mean over.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.top_k, config.num_experts
        self.capacity_factor, self.drop_policy = config.capacity_factor, config.drop_policy
        self.aux_loss_coef = config.aux_loss_coef
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.tokens: TokenShare = OwnTokens()
        self.pool: CapacityPool | None = None
        self.parts = 1

    def forward(self, x_TD: Tensor) -> tuple[Route, RouterStats]:
        """Route every token of x [T, D], together with those of the micro-batch that lie elsewhere.

        Returns the plan of the T tokens, and statistics of the whole micro-batch.
        """
        logits_NE = self.tokens.gather(F.linear(x_TD.float(), self.weight.float()))
        log_prob_NE = logits_NE.log_softmax(-1)
        prob_NE = log_prob_NE.exp()
        factor = self.capacity_factor if self.training else None
        tokens = max(logits_NE.shape[0], 1)  # a capacity is at least 1
        capacity = expert_capacity(tokens, self.top_k, self.num_experts, factor)
        if self.pool is None or capacity is None:
            plan = route(logits_NE, self.top_k, capacity, self.drop_policy)
        else:
            plan = route(logits_NE, self.top_k, None, self.drop_policy, quotas=self.pool.quotas(capacity))
        assignments = max(plan.slot_TK.numel(), 1)
        stats = RouterStats(
            aux_loss=self._balance(prob_NE, plan) * self.aux_loss_coef,
            load_E=plan.wanted_E * (self.num_experts / assignments),
            drop_rate=1.0 - plan.count_E.sum() / assignments,
            entropy=-(prob_NE.detach() * log_prob_NE.detach()).sum() / tokens,
        )
        return self.tokens.mine(plan), stats

    def _balance(self, prob_NE: Tensor, plan: Route) -> Tensor:
        if self.parts == 1 or not self.training:
            return load_balancing_loss(prob_NE, plan.wanted_E, self.top_k)
        wanted_PE = prob_NE.new_zeros(self.parts, self.num_experts, dtype=torch.int32)
        expert_PA = plan.expert_TK.view(self.parts, -1).long()
        wanted_PE.scatter_add_(1, expert_PA, torch.ones_like(expert_PA, dtype=torch.int32))
        rows = zip(prob_NE.chunk(self.parts), wanted_PE, strict=True)
        return torch.stack([load_balancing_loss(*row, self.top_k) for row in rows]).mean()


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
