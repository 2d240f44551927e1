"""The processes that serve one model together, and what they agree on.

All of them plan, schedule and choose alike, because they are told the same requests in the same order. What could
still differ between two machines' processes is asked here: free memory, failures, and a sampled token, as CUDA's
cumulative sums need not add in the same order twice.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.mesh import ParallelContext

T = TypeVar("T")

_WHILE_NOBODY_ASKS = timedelta(days=365)  # followers wait for the next request of a user who may have gone home


class Ranks:
    """One process that serves a model alone, which agrees with itself.

    Attributes:
        rank: of this process; rank 0 leads.
        size: number of processes.
        context: their groups; None for a process alone.
        splits_weights: whether each has a part of the weights alone.
    """

    rank, size = 0, 1
    context: ParallelContext | None = None
    splits_weights = False

    def own_heads(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration with the heads that this process works on: what its caches are made for."""
        return config

    def least(self, number: int) -> int:
        """Return the least of the numbers of all processes."""
        return number

    def check_alike(self, check: Callable[[], T]) -> T:
        """Return what a check returns, unless it fails on a rank: then all raise ConfigError, as the first of these."""
        return check()

    def of_first(self, x: Tensor) -> Tensor:
        """Write what rank 0 has of a tensor, on the device of the model, over it, and return it."""
        return x

    def tell(self, words: Any) -> Any:
        """Return what rank 0 gives; rank 0 need not wait for the others. Waits as long as it takes on the others."""
        return words


class ManyRanks(Ranks):
    """Several processes. Every method that returns what others have is collective.

    Args:
        context: their groups, over which the model is laid out.
    """

    def __init__(self, context: ParallelContext) -> None:
        self.rank, self.size, self.context, self._tp = context.rank, context.layout.world, context, context.layout.tp
        self.splits_weights = context.layout.tp * context.layout.ep * context.layout.etp > 1
        self._control = dist.new_group(backend="gloo", timeout=_WHILE_NOBODY_ASKS)

    def own_heads(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration with this rank's share of the heads.

        Where key/value heads are fewer than ranks, each works with one (`mmtrain.model.mixers.softmax`).
        """
        heads, kv_heads = config.num_heads // self._tp, max(1, config.num_kv_heads // self._tp)
        return replace(config, num_heads=heads, num_kv_heads=kv_heads)

    def least(self, number: int) -> int:
        """Return the least of the numbers of all processes."""
        found = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self._control)
        return int(found)

    def check_alike(self, check: Callable[[], T]) -> T:
        """Return what a check returns, unless it fails on a rank: then all raise ConfigError, as the first of these."""
        made, mine = None, None
        try:
            made = check()
        except ConfigError as error:
            mine = error.option, str(error.value), error.problem, error.fix
        told: list[tuple[str, str, str, str] | None] = [None] * self.size
        dist.all_gather_object(told, mine, group=self._control)
        for rank, failure in enumerate(told):
            if failure is not None:
                option, value, problem, fix = failure
                raise ConfigError(option, value, f"{problem} (rank {rank})", fix)
        return cast(T, made)

    def of_first(self, x: Tensor) -> Tensor:
        """Write what rank 0 has of a tensor, on the device of the model, over it, and return it."""
        dist.broadcast(x, 0)
        return x

    def tell(self, words: Any) -> Any:
        """Return what rank 0 gives: one message of eight bytes where that is an empty list, as at most steps."""
        mine = b"" if words == [] else pickle.dumps(words)
        size = torch.tensor([len(mine)], dtype=torch.int64)
        dist.broadcast(size, 0, group=self._control)
        if not size:
            return []
        data = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if self.rank == 0 else torch.empty(
            int(size), dtype=torch.uint8
        )  # fmt: skip
        dist.broadcast(data, 0, group=self._control)
        return words if self.rank == 0 else pickle.loads(data.numpy().tobytes())  # from a process of our own


ALONE = Ranks()
