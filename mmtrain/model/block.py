"""One layer: a token mixer and a feed-forward, each with its norm and residual.

Legend: T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtrain.config import LIGHTNING, ModelConfig
from mmtrain.model.ffn import SwiGLU
from mmtrain.model.mixers.cache import LightningCache, SoftmaxCache
from mmtrain.model.mixers.lightning import LightningAttention
from mmtrain.model.mixers.softmax import SoftmaxAttention
from mmtrain.model.moe.layer import MoE
from mmtrain.model.moe.router import RouterStats
from mmtrain.model.norm import RMSNorm
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable


class Block(nn.Module):
    """A layer of the hybrid.

    Post-norm (as released): x = RMSNorm(h); h = alpha x + Mixer(x); x = RMSNorm(h); h = alpha x + FFN(x): the residual
    is taken after the norm (MiniMax-01 section 2, Fig. 3). Pre-norm: h = h + Mixer(RMSNorm(h)), and so on.

    Attributes:
        recompute: run forward again in backward and keep only the block's input.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.alpha, self.post_norm = config.alpha, config.post_norm
        self.kind = config.layer_types[layer]
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = LightningAttention(config, layer) if self.kind == LIGHTNING else SoftmaxAttention(config)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = MoE(config) if config.num_experts else SwiGLU(config.hidden_size, config.ffn_hidden_size)
        self.recompute = False

    def forward(
        self, h_TD: Tensor, packing: Packing, rope: RopeTable, cache: LightningCache | SoftmaxCache | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Return the next hidden states [T, D], and what the router did (None in a dense layer)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, h_TD, packing, rope, cache, use_reentrant=False, preserve_rng_state=False)
        return self._run(h_TD, packing, rope, cache)

    def _run(
        self, h_TD: Tensor, packing: Packing, rope: RopeTable, cache: LightningCache | SoftmaxCache | None
    ) -> tuple[Tensor, RouterStats | None]:
        x_TD = self.input_norm(h_TD)
        if self.kind == LIGHTNING:
            mixed_TD = self.mixer(x_TD, packing, cache)
        else:
            mixed_TD = self.mixer(x_TD, packing, rope, cache)
        residual_TD = x_TD if self.post_norm else h_TD
        x_TD, h_TD = self.post_attention_norm.after_residual(residual_TD, mixed_TD, self.alpha)
        out = self.ffn(x_TD)
        out_TD, stats = out if isinstance(out, tuple) else (out, None)
        residual_TD = x_TD if self.post_norm else h_TD
        return torch.add(out_TD, residual_TD, alpha=self.alpha), stats
