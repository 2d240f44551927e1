"""The ranks over which an engine spreads its keys, and what they must agree on."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from mmtrain.errors import ConfigError
from mmtrain.infer.serving.ranks import Ranks

# Below it dense products wait for their weights: n tokens make n operations of each byte of bf16 weights, an H200 makes
# 206 (990 TFLOP/s over 4.8 TB/s). To cut a shorter row saves nothing.
CUT_TOKENS = 256


class RanksDiffer(ConfigError):
    """Ranks of one engine that were asked for different things."""


@dataclass(frozen=True)
class ContextParallel:
    """Context parallelism of an engine, of which every rank has its own, with the same calls in the same order.

    Attributes:
        group: the ranks.
        cut_tokens: prompts' tokens of a step from which on each rank computes a part of them; of fewer, and of decode
            steps, every rank computes all.
    """

    group: ProcessGroup
    cut_tokens: int = CUT_TOKENS

    @property
    def ranks(self) -> int:
        """Their number."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This one among them."""
        return self.group.rank()

    def validate(self, ranks: Ranks) -> None:
        """Refuse a size that makes no sense, and a model whose weights are split.

        Args:
            ranks: that serve the model.

        Raises:
            ConfigError: the size is below 1, or each has a part of the weights alone.
        """
        if ranks.splits_weights:
            raise ConfigError("engine.context", f"{self.ranks} ranks", f"the weights are split over {ranks.size}",
                              "split either weights or keys")  # fmt: skip
        if self.cut_tokens < 1:
            raise ConfigError("context.cut_tokens", self.cut_tokens, "must be at least 1", f"for example {CUT_TOKENS}")

    def least(self, value: int, device: torch.device) -> int:
        """Return the least of all ranks' values."""
        found = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def check_same(self, what: str, text: str, device: torch.device) -> None:
        """Refuse to go on where ranks have different texts.

        Args:
            what: they are, for the message.
            text: this rank's.
            device: of the tensors of the group.

        Raises:
            RanksDiffer: on all ranks, if any two differ.
        """
        mine = int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")
        both = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        most, least = both.tolist()
        if most != -least:
            raise RanksDiffer("engine.context", f"{self.ranks} ranks", f"differ in {what}",
                              "make the same calls in the same order on every rank")  # fmt: skip
