"""A third, plain mixer that only tests register: the mean of all tokens of a document so far, between two projections.

Legend: T tokens, D model width, I inner width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.model.initial import Constant, Initial, Xavier
from mmtrain.model.linear import Linear
from mmtrain.model.mixers.mixer import HeadShard
from mmtrain.model.mixers.registry import MIXERS, MixerSpec, Placement, heads_problem
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable
from mmtrain.model.weights import local


@dataclass
class RunningMeanCache:
    """Sum [I] and number of the tokens of a document."""

    total_I: Tensor | None = None
    count: int = 0


class RunningMean(nn.Module):
    """out_t = W_out (scale * mean_{j<=t} W_in x_j)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.in_proj = Linear(config.hidden_size, config.inner_size)
        self.out_proj = Linear(config.inner_size, config.hidden_size, Xavier(config.beta))
        self.scale_I = nn.Parameter(torch.empty(config.inner_size))
        self.initial: dict[str, Initial] = {"scale_I": Constant(1.0)}

    def split_heads(self, shard: HeadShard) -> None:
        """Nothing but the parameters is of heads."""

    def forward(self, x_TD: Tensor, packing: Packing, rope: RopeTable, cache: RunningMeanCache | None = None) -> Tensor:
        v_TI = self.in_proj(x_TD)
        if cache is None:
            total_TI = torch.cat([part.cumsum(0) for part in v_TI.split(packing.lengths)])
        else:
            total_TI = v_TI.cumsum(0) if cache.total_I is None else v_TI.cumsum(0) + cache.total_I
            cache.total_I, cache.count = total_TI[-1], cache.count + v_TI.shape[0]
            assert cache.count == packing.position_ids_T[-1] + 1
        mean_TI = total_TI / (packing.position_ids_T + 1)[:, None].to(total_TI.dtype)
        return self.out_proj(local(self.scale_I) * mean_TI)


SPEC = MixerSpec(
    letter="M",
    name="running_mean",
    module="tests.model.mixers.running_mean:RunningMean",
    cache="tests.model.mixers.running_mean:RunningMeanCache",
    matrix_weights=lambda model: 2 * model.hidden_size * model.inner_size,
    vector_weights=lambda model: model.inner_size,
    attention_flops=lambda model, doc_lengths: 2 * sum(doc_lengths) * model.inner_size,
    placements=lambda model, tp: {
        "in_proj.weight": Placement.ROWS,
        "scale_I": Placement.ROWS,
        "out_proj.weight": Placement.COLUMNS,
    },
    tp_problem=heads_problem,
)


@contextmanager
def registered() -> Iterator[None]:
    """Let `M` stand for the running mean."""
    with mock.patch.dict(MIXERS, {SPEC.letter: SPEC}):
        yield
