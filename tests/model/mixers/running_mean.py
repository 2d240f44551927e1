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
from mmtrain.model.mixers.batch_cache import CacheShape, DocumentBatch
from mmtrain.model.mixers.mixer import HeadShard
from mmtrain.model.mixers.registry import MIXERS, CacheSize, MixerSpec, Placement, heads_problem
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable
from mmtrain.model.weights import local


class RunningMeanSlots:
    """Sums [slots, I] of many documents."""

    takes_padding = False

    def __init__(self, config: ModelConfig, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        self.total_SI = torch.empty(shape.slots, config.inner_size, device=device)

    def begin(self, slot: int) -> None:
        self.total_SI[slot] = 0

    def copy_slot(self, source: int, target: int) -> None:
        self.total_SI[target] = self.total_SI[source]

    def copy_page(self, source: int, target: int) -> None:
        pass

    def view(self, batch: DocumentBatch) -> RunningMeanBatch:
        return RunningMeanBatch(self.total_SI, batch)


@dataclass(frozen=True)
class RunningMeanBatch:
    """Sums of the documents of one pass."""

    total_SI: Tensor
    batch: DocumentBatch

    def add(self, v_TI: Tensor, packing: Packing) -> Tensor:
        parts = v_TI.split(self.batch.queries)
        totals = [part.cumsum(0) + self.total_SI[slot] for part, slot in zip(parts, self.batch.slots_N, strict=True)]
        self.total_SI[self.batch.slots_N] = torch.stack([total_LI[-1] for total_LI in totals])
        return torch.cat(totals)


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

    def forward(
        self,
        x_TD: Tensor,
        packing: Packing,
        rope: RopeTable,
        cache: RunningMeanBatch | None = None,
    ) -> Tensor:
        v_TI = self.in_proj(x_TD)
        if cache is None:
            total_TI = torch.cat([part.cumsum(0) for part in v_TI.split(packing.lengths)])
        else:
            total_TI = cache.add(v_TI, packing)
        mean_TI = total_TI / (packing.position_ids_T + 1)[:, None].to(total_TI.dtype)
        return self.out_proj(local(self.scale_I) * mean_TI)


SPEC = MixerSpec(
    letter="M",
    name="running_mean",
    module="tests.model.mixers.running_mean:RunningMean",
    matrix_weights=lambda model: 2 * model.hidden_size * model.inner_size,
    vector_weights=lambda model: model.inner_size,
    attention_flops=lambda model, doc_lengths: 2 * sum(doc_lengths) * model.inner_size,
    placements=lambda model, tp: {
        "in_proj.weight": Placement.ROWS,
        "scale_I": Placement.ROWS,
        "out_proj.weight": Placement.COLUMNS,
    },
    tp_problem=heads_problem,
    batch_cache="tests.model.mixers.running_mean:RunningMeanSlots",
    cache_size=lambda model: CacheSize(document=model.inner_size),
)


@contextmanager
def registered() -> Iterator[None]:
    """Let `M` stand for the running mean."""
    with mock.patch.dict(MIXERS, {SPEC.letter: SPEC}):
        yield
