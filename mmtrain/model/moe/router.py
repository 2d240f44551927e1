"""The router: which experts a token goes to, and which assignments an expert's capacity lets pass.

Legend: T tokens, N tokens of the micro-batch (T unless they lie on several ranks), M of them that are no padding, D
model width, E experts, K experts of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmkernels.moe import Quotas, Route, route
from mmkernels.router import balance_stats, router_logits
from mmtrain.config import ModelConfig
from mmtrain.model.initial import XAVIER, Initial
from mmtrain.model.moe.padding import around_padding
from mmtrain.model.packed_seq import Packing, RealTokens
from mmtrain.model.weights import local


class RouterStats(NamedTuple):
    """Figures of one layer's router for one micro-batch, of its tokens without padding.

    Scalars are fp32, and all but the loss are detached.

    Attributes:
        aux_loss: scalar, already times its coefficient, to be added to the loss.
        assigned_E: int32, assignments of each expert before any was dropped.
        drop_rate: scalar, share of assignments dropped.
        drop_rate_alone: scalar, share that the micro-batch's own capacity would have dropped; `drop_rate` unless
            capacity is pooled.
        entropy: scalar, mean entropy of the router's distribution, in nats.
    """

    aux_loss: Tensor
    assigned_E: Tensor
    drop_rate: Tensor
    drop_rate_alone: Tensor
    entropy: Tensor


class MicroBatch(Protocol):
    """The tokens that are routed together, wherever they lie, and the part of their route that is used here."""

    def gather(self, logits_TE: Tensor, packing: Packing | None) -> Tensor:
        """Logits of all N tokens that are routed together, [N, E] in their order, given this rank's."""

    def local_route(self, plan: Route, packing: Packing | None) -> Route:
        """The route that this rank's experts are called with, given that of all N tokens."""


class LocalMicroBatch:
    """A micro-batch all of whose tokens lie on this device."""

    def gather(self, logits_TE: Tensor, packing: Packing | None) -> Tensor:
        """The logits as they are."""
        return logits_TE

    def local_route(self, plan: Route, packing: Packing | None) -> Route:
        """The route as it is."""
        return plan


class CapacityPool(Protocol):
    """Shares capacity out among micro-batches."""

    def quotas(self, capacity: int, differs: bool = False) -> Quotas:
        """For `route`: what this micro-batch may keep of each expert, where alone it would have `capacity`.

        With `differs`, others may have another capacity.
        """


@dataclass(frozen=True)
class RoutingScope:
    """The tokens that a router takes as one, for routing, for capacity and for the auxiliary loss.

    Attributes:
        micro_batch: tokens that are routed together.
        pool: shares capacity with other micro-batches; None: each has its own.
        parts: equal parts of the micro-batch (its rows) that the auxiliary loss is the mean over.
    """

    micro_batch: MicroBatch = field(default_factory=LocalMicroBatch)
    pool: CapacityPool | None = None
    parts: int = 1


class Router(nn.Module):
    """Top-k routing in fp32 (MiniMax-01 eq. 1 and section 2.1).

    Capacity holds in training mode alone: after `model.eval()` nothing is dropped, as in the released inference code.

    Attributes:
        scope: the tokens that are taken as one; parallelism gives it another.
        fractions_E: fp32 buffer, fractions that the auxiliary loss takes in place of the micro-batch's own: assignments
            a token of each expert, summing to k. None: its own. See :meth:`use_global_fractions`.
    """

    fractions_E: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.top_k, config.num_experts
        self.capacity_factor, self.drop_policy = config.capacity_factor, config.drop_policy
        self.aux_loss_coef = config.aux_loss_coef
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.initial: dict[str, Initial] = {"weight": XAVIER}
        self.scope = RoutingScope()
        self.register_buffer("fractions_E", None)

    def use_global_fractions(self) -> None:
        """Let the auxiliary loss take the fractions of a global batch, even ones until they are updated."""
        even = self.top_k / self.num_experts
        self.fractions_E = torch.full((self.num_experts,), even, device=self.weight.device)

    def update_fractions(self, assigned_E: Tensor, skipped: Tensor) -> None:
        """Take the fractions of a global batch, if the auxiliary loss uses them.

        A step's own are not known before its last micro-batch, so they serve the next step; the gradient flows through
        the mean probabilities alone, of which the mean over micro-batches is the global batch's (where all have as many
        tokens: one with padding weighs as much as others).

        Args:
            assigned_E: float64 whole numbers, so that no order of summing them changes a bit: assignments of all tokens
                of the global batch.
            skipped: bool scalar, whether the step does not count; nothing waits for it.
        """
        if self.fractions_E is not None:
            fresh_E = (assigned_E * self.top_k / assigned_E.sum()).to(self.fractions_E)
            self.fractions_E.copy_(torch.where(skipped.to(fresh_E.device), self.fractions_E, fresh_E))

    def forward(self, x_TD: Tensor, packing: Packing | None = None) -> tuple[Route, RouterStats]:
        """Route every token of x [T, D], together with those of the micro-batch that lie elsewhere.

        Returns the plan of the T tokens, and statistics of the whole micro-batch.

        Args:
            x_TD: tokens of this rank.
            packing: of the micro-batch; its tokens that are no padding alone are routed and counted. None: all.
        """
        real = None if packing is None else packing.real
        logits_NE = self.scope.micro_batch.gather(router_logits(x_TD, local(self.weight).float()), packing)
        logits_ME = logits_NE if real is None else logits_NE.index_select(0, real.index_M)
        capacity, pool = self._capacity(logits_ME.shape[0]), self.scope.pool
        pooled = pool is not None and capacity is not None
        if pooled:
            quotas = pool.quotas(capacity) if real is None else pool.quotas(capacity, differs=True)
            plan = route(logits_ME, self.top_k, None, self.drop_policy, quotas=quotas)
        else:
            plan = route(logits_ME, self.top_k, capacity, self.drop_policy)
        stats = self._statistics(logits_ME, plan, capacity if pooled else None, real)
        if real is not None:
            # Ranks agree on the capacity of all tokens, which is enough for any number of them.
            tokens = logits_NE.shape[0]
            plan = around_padding(plan, real.index_M, tokens, None if pooled else self._capacity(tokens))
        return self.scope.micro_batch.local_route(plan, packing), stats

    def _capacity(self, tokens: int) -> int | None:
        """Capacity of so many tokens, at least 1; None drops nothing."""
        factor = self.capacity_factor if self.training else None
        return expert_capacity(max(tokens, 1), self.top_k, self.num_experts, factor)

    def _statistics(
        self, logits_ME: Tensor, plan: Route, capacity_alone: int | None, real: RealTokens | None
    ) -> RouterStats:
        """Figures of a plan; `capacity_alone` is the micro-batch's own where it is pooled."""
        assignments = plan.row_TK.numel()
        some, assignments = float(assignments > 0), max(assignments, 1)
        drop_rate = drop_rate_alone = some - plan.offset_E[-1] / assignments  # the last offset: all that were kept
        if capacity_alone is not None:
            drop_rate_alone = some - plan.assigned_E.clamp(max=capacity_alone).sum() / assignments
        aux_loss, entropy = self._balance(logits_ME, plan, real)
        return RouterStats(aux_loss, plan.assigned_E, drop_rate, drop_rate_alone, entropy)

    def _balance(self, logits_ME: Tensor, plan: Route, real: RealTokens | None) -> tuple[Tensor, Tensor]:
        """The auxiliary loss, times its coefficient, and the mean entropy."""
        scale = self.aux_loss_coef / self.top_k
        if self.fractions_E is not None:
            mean_E, entropy = balance_stats(logits_ME)
            # Where the optimizer runs in host memory, buffers begin there.
            return _imbalance(mean_E, self.fractions_E.to(mean_E.device), scale), entropy
        tokens, parts = max(logits_ME.shape[0], 1), self.scope.parts
        if parts == 1 or not self.training:
            mean_E, entropy = balance_stats(logits_ME)
            return _imbalance(mean_E, plan.assigned_E, scale / tokens), entropy
        if real is not None:
            return self._balance_of_rows(logits_ME, plan, real, scale)
        mean_PE, entropy_P = zip(*(balance_stats(part_TE) for part_TE in logits_ME.chunk(parts)), strict=True)
        assigned_PE = logits_ME.new_zeros(parts, self.num_experts)
        expert_PA = plan.expert_TK.view(parts, -1).long()
        assigned_PE.scatter_add_(1, expert_PA, assigned_PE.new_ones(()).expand_as(expert_PA))
        # A part's fractions divide by its own tokens, the mean over parts by their number: by N, as the whole's do.
        return _imbalance(torch.stack(mean_PE), assigned_PE, scale / tokens), torch.stack(entropy_P).mean()

    def _balance_of_rows(self, logits_ME: Tensor, plan: Route, real: RealTokens, scale: float) -> tuple[Tensor, Tensor]:
        """:meth:`_balance` over rows of unequal numbers of tokens: the mean over those that have any."""
        counts = [count for count in real.per_row if count]
        scale /= max(len(counts), 1)
        loss, entropy = logits_ME.new_zeros(()), logits_ME.new_zeros(())
        parts = zip(logits_ME.split(counts), plan.expert_TK.split(counts), strict=True) if counts else ()
        for part_SE, expert_SK in parts:
            expert_A, count = expert_SK.flatten().long(), part_SE.shape[0]
            assigned_E = part_SE.new_zeros(self.num_experts).scatter_add_(
                0, expert_A, part_SE.new_ones(()).expand_as(expert_A)
            )
            mean_E, mean_entropy = balance_stats(part_SE)
            loss = loss + _imbalance(mean_E, assigned_E, scale / count)
            entropy = entropy + mean_entropy * (count / logits_ME.shape[0])
        return loss, entropy


def load_balancing_loss(prob_TE: Tensor, assigned_E: Tensor, top_k: int) -> Tensor:
    """E/k * sum_i f_i m_i: f_i assignments to expert i a token (sums to k), m_i its mean probability; 1 is balanced.

    The paper prints (1/E) * sum_i f_i m_i (MiniMax-01 section 2.1): multiply by k/E^2 to get its value. f is taken
    before anything is dropped and carries no gradient. Equal to megatron-core's `switch_load_balancing_loss_func`.
    """
    tokens = max(prob_TE.shape[0], 1)
    return _imbalance(prob_TE.sum(0), assigned_E, 1 / (top_k * tokens * tokens))


def _imbalance(mean_E: Tensor, assigned_E: Tensor, scale: float) -> Tensor:
    """E * sum_i f_i m_i * scale, as few launches as it takes; f and m may have rows, which are summed too."""
    return (mean_E * assigned_E).sum() * (mean_E.shape[-1] * scale)


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: float | None) -> int | None:
    """Assignments one expert takes: ceil(T * k / E * factor), rounded in megatron-core's order; None drops nothing."""
    return None if factor is None else math.ceil(tokens * top_k / num_experts * factor)
