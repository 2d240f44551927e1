"""Grouped-query softmax attention with partial RoPE, the mixer of every eighth layer.

Legend: T tokens, D model width, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.model.mixers.attention import AttentionCall, LocalAttention
from mmtrain.model.mixers.cache import SoftmaxCache
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable, apply_rope


class SoftmaxAttention(nn.Module):
    """Causal softmax attention, scale 1/sqrt(K), RoPE on the first `rotary_dim` dimensions (MiniMax-01 section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, kv_size = config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.attention: AttentionCall = LocalAttention()

    def forward(self, x_TD: Tensor, packing: Packing, rope: RopeTable, cache: SoftmaxCache | None = None) -> Tensor:
        """Mix tokens of the same document; x and result are [T, D].

        With a cache, the tokens continue the cached document, and their keys and values are added to it.
        """
        q_THK = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TGK = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_THK, k_TGK = apply_rope(q_THK, rope), apply_rope(k_TGK, rope)
        if cache is None:
            o_THK = self.attention.softmax(q_THK, k_TGK, v_TGK, packing)
        else:
            o_THK = causal_softmax(q_THK, *cache.append(k_TGK, v_TGK))
        return self.o_proj(o_THK.flatten(-2))


def causal_softmax(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
    """Attention of a document's last tokens over all of it, through SDPA: queries may be fewer than keys; [T, H, K]."""
    queries, keys = q_THK.shape[0], k_TGK.shape[0]
    mask = None
    if 1 < queries < keys:  # SDPA's own causal mask aligns the first query with the first key
        offset = keys - queries
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_THK.device).tril(offset)
    q, k, v = (t.transpose(0, 1)[None] for t in (q_THK, k_TGK, v_TGK))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and queries > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o[0].transpose(0, 1)
