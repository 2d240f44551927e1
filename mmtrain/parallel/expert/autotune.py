"""The number of token groups that is best on this machine, measured with the shapes of the run."""

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
from mmtrain.parallel.expert.exchange import ExpertExchange
from mmtrain.parallel.mesh import ParallelContext

WARMUPS, REPEATS = 2, 5
WORTH = 0.99
"""A larger number of groups has to be this much faster than a smaller one: less is noise."""


@dataclass(frozen=True)
class TokenGroupsChoice:
    """The number of token groups that was chosen, and the times that it was chosen by.

    Attributes:
        token_groups: the number that pays.
        seconds: of forward and backward of one layer's experts on the slowest rank, by number of groups.
    """

    token_groups: int
    seconds: dict[int, float]

    def __str__(self) -> str:
        times = ", ".join(f"{number}: {seconds * 1e3:.2f} ms" for number, seconds in self.seconds.items())
        return f"token_groups=auto took {self.token_groups} (a layer's experts, forward and backward: {times})"


def tune_token_groups(
    exchange: ExpertExchange, config: ModelConfig, context: ParallelContext, tokens: int, dtype: torch.dtype
) -> TokenGroupsChoice:
    """Try 1, 2, 4 and 8 token groups, those that fit, and let the exchange keep the fastest. COLLECTIVE over all ranks.

    All ranks decide alike, by the slowest one's times.

    Args:
        exchange: of the model's experts.
        config: of the model.
        context: this process's place in the layout.
        tokens: of a micro-batch on this rank.
        dtype: in which the experts compute.

    Raises:
        ConfigError: rows of a single group are to be read directly and cannot be.
    """
    local_experts = config.num_experts // context.layout.ep
    candidates = [number for number in (1, 2, 4, 8) if number <= local_experts or number % local_experts == 0]
    trial = _Trial(exchange, config, context, tokens, dtype)
    times = torch.tensor([trial.seconds(number) for number in candidates], dtype=torch.float64, device=context.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    seconds = dict(zip(candidates, times.tolist(), strict=True))
    choice = TokenGroupsChoice(fewest_that_pay(seconds), seconds)
    exchange.set_token_groups(choice.token_groups)
    return choice


def fewest_that_pay(seconds: dict[int, float]) -> int:
    """The fewest token groups that no larger number beats clearly.

    Args:
        seconds: by number of token groups.
    """
    best = min(seconds)
    for number in sorted(seconds):
        if seconds[number] < WORTH * seconds[best]:
            best = number
    return best


class _Trial:
    """One layer's experts with weights and tokens of its own."""

    def __init__(
        self, exchange: ExpertExchange, config: ModelConfig, context: ParallelContext, tokens: int, dtype: torch.dtype
    ) -> None:
        layout, device = context.layout, context.device
        self.exchange, self.device = exchange, device
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

    def seconds(self, token_groups: int) -> float:
        """Median time of forward and backward with so many token groups."""
        self.exchange.set_token_groups(token_groups)
        times = [self._once() for _ in range(WARMUPS + REPEATS)]
        return statistics.median(times[WARMUPS:])

    def _once(self) -> float:
        leaves: list[Tensor] = [self.x_TD, *self.experts.parameters()]
        self._wait()
        began = time.perf_counter()
        torch.autograd.grad(self.exchange(self.experts, self.x_TD, self.plan), leaves, self.dy_TD)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
