"""Continuation of one document by the caches of its mixers alone: what the engine's caches of many are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtrain.model.mixers.cache import DecodeCache
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing


@torch.no_grad()
def decode(model: HybridLM, tokens_T: Tensor, cache: DecodeCache) -> Tensor:
    """Read tokens that continue the cached document, and return their logits [T, V]."""
    packing = Packing.from_lengths([tokens_T.shape[0]], tokens_T.device, start=cache.length)
    return model(tokens_T, packing, cache=cache)
