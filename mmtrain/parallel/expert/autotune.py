"""How many groups a layer's experts are best cut into on this machine, measured with the shapes of the run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkernels.moe import route
from mmtrain.config import ModelConfig
from mmtrain.model.moe.experts import Experts
from mmtrain.model.moe.router import expert_capacity
from mmtrain.parallel.expert.expert_parallel import ExchangedExperts
from mmtrain.parallel.mesh import ParallelContext

WARMUPS, REPEATS = 2, 5
WORTH = 0.99
"""A larger number of groups has to be this much faster than a smaller one: less is noise."""


@dataclass(frozen=True)
class Choice:
    """What was measured.

    Attributes:
        groups: the number that pays.
        seconds: of forward and backward of one layer's experts on the slowest rank, by number of groups.
    """

    groups: int
    seconds: dict[int, float]

    def __str__(self) -> str:
        times = ", ".join(f"{groups}: {seconds * 1e3:.2f} ms" for groups, seconds in self.seconds.items())
        return f"token_groups=auto took {self.groups} (a layer's experts, forward and backward: {times})"


def tune_groups(
    call: ExchangedExperts, config: ModelConfig, context: ParallelContext, tokens: int, dtype: torch.dtype
) -> Choice:
    """Try 1, 2, 4 and 8 groups, those that fit, and keep the fastest; all ranks decide alike.

    Args:
        tokens: of a micro-batch on this rank.
        dtype: in which the experts compute.
    """
    held = config.num_experts // context.layout.ep
    candidates = [groups for groups in (1, 2, 4, 8) if groups <= held or groups % held == 0]
    trial = _Trial(call, config, context, tokens, dtype)
    times = torch.tensor([trial.seconds(groups) for groups in candidates], dtype=torch.float64, device=context.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    seconds = dict(zip(candidates, times.tolist(), strict=True))
    call.groups = choose(seconds)
    return Choice(call.groups, seconds)


def choose(seconds: dict[int, float]) -> int:
    """The fewest groups that no larger number beats clearly."""
    best = min(seconds)
    for groups in sorted(seconds):
        if seconds[groups] < WORTH * seconds[best]:
            best = groups
    return best


class _Trial:
    """One layer's experts with weights and tokens of its own."""

    def __init__(
        self, call: ExchangedExperts, config: ModelConfig, context: ParallelContext, tokens: int, dtype: torch.dtype
    ) -> None:
        layout, device = context.layout, context.device
        self.call, self.device = call, device
        with torch.device(device):
            self.experts = Experts(
                config.num_experts // layout.ep, config.hidden_size, config.ffn_hidden_size // layout.etp
            )
        self.experts.to(dtype).requires_grad_()
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.02)
        # Ranks that hold parts of one micro-batch route it together, so they draw the same logits.
        generator = torch.Generator().manual_seed(context.dp_rank)
        logits_NE = torch.randn(tokens * layout.tp, config.num_experts, generator=generator).to(device)
        capacity = expert_capacity(logits_NE.shape[0], config.top_k, config.num_experts, config.capacity_factor)
        self.plan = route(logits_NE, config.top_k, capacity, config.drop_policy)
        self.x_TD = torch.randn(tokens, config.hidden_size, device=device, dtype=dtype).requires_grad_()
        self.dy_TD = torch.randn_like(self.x_TD)

    def seconds(self, groups: int) -> float:
        """Median time of forward and backward."""
        self.call.groups = groups
        times = [self._once() for _ in range(WARMUPS + REPEATS)]
        return statistics.median(times[WARMUPS:])

    def _once(self) -> float:
        leaves: list[Tensor] = [self.x_TD, *self.experts.parameters()]
        self._wait()
        began = time.perf_counter()
        torch.autograd.grad(self.call(self.experts, self.x_TD, self.plan), leaves, self.dy_TD)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
