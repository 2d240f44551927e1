"""Models that cover what the formats know, and folders written from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mmtrain.hf.export import export
from mmtrain.hf.sources import ModuleWeights
from mmtrain.hf.target import TARGETS, Target
from tests.model.small import small_model

SHAPES = {
    "hybrid, half of each head rotated": dict(num_layers=4, layer_pattern="LLLS", rotary_dim=8),
    "whole heads, 8 experts, top-3": dict(num_layers=2, layer_pattern="LS", num_experts=8, top_k=3, num_kv_heads=4),
    "dense, 6 heads, lightning last": dict(num_layers=3, layer_pattern="SLL", num_heads=6, num_kv_heads=1,
                                           num_experts=0, rotary_dim=4),
    "nothing rotated, own alpha": dict(num_layers=2, layer_pattern="S", rotary_dim=0, deepnorm_alpha=1.7,
                                       norm_eps=1e-4),
    "one expert": dict(num_layers=2, layer_pattern="LS", num_experts=1, top_k=1, rotary_dim=12),
}  # fmt: skip
SHARED = dict(num_layers=2, layer_pattern="LS", rotary_dim=8, shared_ffn_hidden_size=24)
PRE_NORM = dict(num_layers=2, layer_pattern="LS", rotary_dim=8, post_norm=False)


def write(
    model: nn.Module,
    out: Path,
    target: str | Target = "hf",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 10**9,
) -> Path:
    """Export a model, and return the folder."""
    target = TARGETS[target] if isinstance(target, str) else target
    target.check(model.config)
    export(model.config, ModuleWeights(model), target, out, dtype, longest=4096, shard_bytes=shard_bytes)
    return out


def made(shape: str | dict, **changes: object) -> nn.Module:
    """A model of a shape, with norms that are not all 1."""
    return small_model(**{**(SHAPES[shape] if isinstance(shape, str) else shape), **changes})


PLAIN = replace(TARGETS["hf"], plain_rope=True)
