"""Lightning (decayed linear) attention, the mixer of seven layers in eight.

Legend: T tokens, C tokens of a chunk, D model width, H heads, J heads of a group, K head dimension, I = H * K, N = 3 I,
X = 3 K.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels.norm_gate import norm_gate
from mmtrain.config import ModelConfig
from mmtrain.model.gradient_sum import gradient_sum_of
from mmtrain.model.initial import Xavier, XavierQKV
from mmtrain.model.linear import Linear
from mmtrain.model.mixers.attention import AttentionCall, LocalAttention
from mmtrain.model.mixers.lightning_slots import LightningBatch
from mmtrain.model.mixers.mixer import HeadShard
from mmtrain.model.norm import RMSNorm
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable
from mmtrain.model.weights import local


def decay_slopes(num_heads: int, layer: int, num_layers: int) -> list[float]:
    """Return the slopes s of the decay exp(-s) a token, one a head, from the *global* head and layer index.

    s[h, l] = 2^(-8h/H) * (1 - l/(L-1) + 1e-5), h = 1..H, l = 0..L-1 counting softmax layers too (the released
    modeling code). Head counts that are no power of two interpolate as ALiBi does.
    """
    factor = 1.0 - layer / max(num_layers - 1, 1) + 1e-5
    return [slope * factor for slope in _head_slopes(num_heads)]


def _head_slopes(num_heads: int) -> list[float]:
    if math.log2(num_heads).is_integer():
        return [2.0 ** (-8.0 * h / num_heads) for h in range(1, num_heads + 1)]
    below = 2 ** math.floor(math.log2(num_heads))
    return _head_slopes(below) + _head_slopes(2 * below)[0::2][: num_heads - below]


Projections = Callable[[Linear, Linear, Tensor], tuple[Tensor, Tensor]]
"""Takes W_qkv, W_gate and tokens [T, D]; returns both products, [T, N] and [T, I], rows at any distance."""


def project_apart(qkv_proj: Linear, output_gate: Linear, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return W_qkv x, [T, N], and W_gate x, [T, I]."""
    return qkv_proj(x_TD), output_gate(x_TD)


class LightningAttention(nn.Module):
    """out = W_o (sigmoid(W_gate x) * RMSNorm(o)), o_t = sum_{j<=t} exp(-s (t-j)) (q_t . k_j) v_j.

    q, k, v = SiLU(W_qkv x), with no scale, softmax, denominator or RoPE; the norm spans all heads (MiniMax-01 section
    2.2 and Fig. 3, details from the released code). Rows of W_qkv are interleaved by head: K of q, K of k, K of v.

    Attributes:
        num_heads: H, the heads that this process works on.
        head_groups: groups of heads that are worked on one after the other, each computed again in backward, where
            memory must hold one group's projection in place of all heads'; they divide H.
        attention: the kernel, or a call that talks to other ranks.
        project: both projections of tokens that continue a cache's documents. Serving may compute them as one product.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, inner = config.num_heads, config.head_dim, config.inner_size
        self.head_groups = 1
        self._slopes = decay_slopes(config.num_heads, layer, config.num_layers)
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.qkv_proj = Linear(config.hidden_size, 3 * inner, XavierQKV(config.head_dim, value_gain=config.beta))
        self.output_gate = Linear(config.hidden_size, inner)
        self.out_proj = Linear(inner, config.hidden_size, Xavier(config.beta))
        self.norm = RMSNorm(inner, config.lightning_norm_eps)
        self._slopes_H: Tensor | None = None
        self.attention: AttentionCall = LocalAttention()
        self.project: Projections = project_apart
        # Of `norm_gate`, where the heads lie on several ranks: columns of all of them, and what sums over ranks.
        self._norm_width: int | None = None
        self._norm_reduce: Callable[[Tensor], Tensor] | None = None

    def split_heads(self, shard: HeadShard) -> None:
        """Work on this rank's heads alone: slopes stay those of the global heads, and the norm spans all ranks'."""
        self._norm_width, self._norm_reduce = self.num_heads * self.head_dim, shard.reduce
        self._slopes = self._slopes[shard.of(self.num_heads)]
        self.num_heads, self._slopes_H = len(self._slopes), None

    def slopes_on(self, device: torch.device) -> Tensor:
        """Return the decay slopes, fp32 [H]: no parameter and no buffer, so that no cast of the module touches them."""
        if self._slopes_H is None or self._slopes_H.device != device:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
                self._slopes_H = torch.tensor(self._slopes, dtype=torch.float32, device=device)
        return self._slopes_H

    def forward(self, x_TD: Tensor, packing: Packing, rope: RopeTable, cache: LightningBatch | None = None) -> Tensor:
        """Mix tokens of the same document; x and result are [T, D].

        With a cache, the tokens continue its documents, and their states are brought up to date. The decay is all
        that tells positions apart: `rope` is not used.
        """
        if cache is not None:
            return self._continue(x_TD, cache)
        if self.head_groups > 1:
            return self._mix_in_groups(x_TD, packing)
        qkv_THX = self.qkv_proj(x_TD).unflatten(-1, (self.num_heads, 3 * self.head_dim))
        end_lightning = self.attention.begin_lightning(qkv_THX, self.slopes_on(x_TD.device), packing)
        gate_TI = self.output_gate(x_TD)
        return self._finish(end_lightning().flatten(-2), gate_TI)

    def _continue(self, x_TD: Tensor, cache: LightningBatch) -> Tensor:
        """Mix tokens that continue the documents of a cache."""
        qkv_TN, gate_TI = self.project(self.qkv_proj, self.output_gate, x_TD)
        qkv_THX = qkv_TN.unflatten(-1, (self.num_heads, 3 * self.head_dim))
        return self._finish(cache.attend(qkv_THX, self.slopes_on(x_TD.device)).flatten(-2), gate_TI)

    def _finish(self, o_TI: Tensor, gate_TI: Tensor) -> Tensor:
        y_TI = norm_gate(
            o_TI, gate_TI, local(self.norm.weight), self.norm.eps, width=self._norm_width, reduce=self._norm_reduce
        )
        return self.out_proj(y_TI)

    def _mix_in_groups(self, x_TD: Tensor, packing: Packing) -> Tensor:
        """Mix by groups of heads up to the norm, which spans them all, and from there by as many chunks of tokens.

        Between forward and backward the attention's output waits, I elements a token in place of 9 I.
        """
        heads = self.num_heads // self.head_groups
        groups = [slice(first, first + heads) for first in range(0, self.num_heads, heads)]
        o_TI = torch.cat([_again(self._attend_group, x_TD, packing, group) for group in groups], dim=-1)
        chunk = max(1, -(-x_TD.shape[0] // self.head_groups))
        chunks = zip(x_TD.split(chunk), o_TI.split(chunk), strict=True)
        # torch's own product saves its input before it computes: backward need not compute it again.
        spares = gradient_sum_of(self.out_proj.weight) is None
        return torch.cat([_again(self._finish_chunk, x_CD, o_CI, early_stop=spares) for x_CD, o_CI in chunks])

    def _attend_group(self, x_TD: Tensor, packing: Packing, heads: slice) -> Tensor:
        """Return the attention's output of some heads, [T, J K]."""
        width = 3 * self.head_dim
        qkv_TJX = self.qkv_proj(x_TD, slice(heads.start * width, heads.stop * width)).unflatten(-1, (-1, width))
        slopes_J = self.slopes_on(x_TD.device)[heads]
        return self.attention.begin_lightning(qkv_TJX, slopes_J, packing)().flatten(-2)

    def _finish_chunk(self, x_CD: Tensor, o_CI: Tensor) -> Tensor:
        return self._finish(o_CI, self.output_gate(x_CD))


def _again(function: Callable[..., Tensor], *args: object, early_stop: bool = False) -> Tensor:
    """Call a function that keeps its arguments alone, and is computed again in backward.

    Args:
        function: what is called.
        args: its arguments.
        early_stop: compute it again no further than to what is saved last. Where an autograd function of ours saves
            that, all is computed by then; and torch 2.11 lost the exception that stops it where CUDA memory was traced.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, early_stop=early_stop)
