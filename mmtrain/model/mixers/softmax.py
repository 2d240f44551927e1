"""Grouped-query softmax attention with partial RoPE, the mixer of every eighth layer.

Legend: T tokens, D model width, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.model.initial import Xavier
from mmtrain.model.linear import Linear
from mmtrain.model.mixers.attention import AttentionCall, LocalAttention
from mmtrain.model.mixers.mixer import HeadShard
from mmtrain.model.mixers.softmax_pages import SoftmaxBatch
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable, apply_rope


class SoftmaxAttention(nn.Module):
    """Causal softmax attention, scale 1/sqrt(K), RoPE on the first `rotary_dim` dimensions (MiniMax-01 section 2).

    Attributes:
        attention: the kernel, or a call that talks to other ranks.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.num_kv_heads = config.head_dim, config.num_kv_heads
        kv_size = config.num_kv_heads * config.head_dim
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.q_proj = Linear(config.hidden_size, config.inner_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size, Xavier(config.beta))
        self.o_proj = Linear(config.inner_size, config.hidden_size, Xavier(config.beta))
        self.attention: AttentionCall = LocalAttention()
        # Rows of k_proj and v_proj that this process works with; None: all that it has.
        self._kv_rows: slice | None = None

    def split_heads(self, shard: HeadShard) -> None:
        """Work on this rank's query heads alone, and on the key/value heads that these share.

        Where ranks are more than key/value heads, every rank has the weights of all of these and uses one head's.
        """
        if self.num_kv_heads % shard.ranks:
            head = shard.rank * self.num_kv_heads // shard.ranks
            self._kv_rows = slice(head * self.head_dim, (head + 1) * self.head_dim)

    def forward(self, x_TD: Tensor, packing: Packing, rope: RopeTable, cache: SoftmaxBatch | None = None) -> Tensor:
        """Mix tokens of the same document; x and result are [T, D].

        With a cache, the tokens continue the cached documents, and their keys and values are added to it.
        """
        q_THK, k_TGK, v_TGK = self.project(x_TD, rope)
        if cache is None:
            o_THK = self.attention.softmax(q_THK, k_TGK, v_TGK, packing)
        else:
            o_THK = cache.attend(q_THK, k_TGK, v_TGK)
        return self.finish(o_THK)

    def project(self, x_TD: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of every token, rotated: what attention takes."""
        q_THK = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TGK = self.k_proj(x_TD, self._kv_rows).unflatten(-1, (-1, self.head_dim))
        v_TGK = self.v_proj(x_TD, self._kv_rows).unflatten(-1, (-1, self.head_dim))
        return apply_rope(q_THK, rope), apply_rope(k_TGK, rope), v_TGK

    def finish(self, o_THK: Tensor) -> Tensor:
        """Return the mixer's result [T, D], given attention's."""
        return self.o_proj(o_THK.flatten(-2))
