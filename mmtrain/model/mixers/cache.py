"""What decoding remembers of one document.

Legend: T tokens, G key/value heads, H heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmtrain.config import SOFTMAX, ModelConfig


@dataclass
class LightningCache:
    """The recurrent state of a lightning layer, fp32 [1, H, K, K]; None before the first token."""

    state: Tensor | None = None


@dataclass
class SoftmaxCache:
    """Keys and values of a softmax layer, [T, G, K] each; None before the first token."""

    k_TGK: Tensor | None = None
    v_TGK: Tensor | None = None

    def append(self, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens and return all of them."""
        if self.k_TGK is not None and self.v_TGK is not None:
            k_TGK, v_TGK = torch.cat([self.k_TGK, k_TGK]), torch.cat([self.v_TGK, v_TGK])
        self.k_TGK, self.v_TGK = k_TGK, v_TGK
        return k_TGK, v_TGK


@dataclass
class DecodeCache:
    """One cache a layer, and the number of tokens seen."""

    layers: list[LightningCache | SoftmaxCache] = field(default_factory=list)
    length: int = 0

    @staticmethod
    def empty(config: ModelConfig) -> DecodeCache:
        """The cache of a document of which nothing has been read."""
        return DecodeCache([SoftmaxCache() if kind == SOFTMAX else LightningCache() for kind in config.layer_types])
