"""The vision transformer: CLIP's, without the norm and the projection of its class token (Radford et al., 2021).

Tiles are a batch; each is a sequence of its own, in which every token sees every other.

Legend: N tiles, S pixels of a tile's side, P patches of a tile, Q tokens of a tile (the class token and P), T = N Q,
W width, H heads, K head dimension, F inner width of the feed-forward, X = 3 patch_size^2 numbers of a patch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtrain.config import VisionConfig
from mmtrain.model.gradient_sum import project
from mmtrain.model.initial import XAVIER, Constant, Initial, Uniform, Xavier
from mmtrain.model.weights import local
from mmtrain.vision.layers import ACTIVATIONS, Affine, LayerNorm

_POSITION_DEVIATION = 0.02  # CLIP's initializer_range


class PatchEmbedding(nn.Module):
    """Tokens of a tile: a class token, then its patches, projected, row by row; each with its position's embedding."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, self.patch_size = config.hidden_size, config.patch_size
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.class_W = nn.Parameter(torch.empty(width))
        self.patch_WX = nn.Parameter(torch.empty(width, 3 * config.patch_size**2))
        self.position_QW = nn.Parameter(torch.empty(config.patches + 1, width))
        self.initial: dict[str, Initial] = {
            "class_W": Uniform(width**-0.5),
            "patch_WX": XAVIER,
            "position_QW": Uniform(_POSITION_DEVIATION),
        }

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """Return the tokens [N, Q, W] of normalised tiles, in the dtype of the weights."""
        weight_WX = local(self.patch_WX)
        x_NPX = patches_of(pixels_N3SS.to(weight_WX.dtype), self.patch_size)
        tiles, patches, _ = x_NPX.shape
        x_NPW = project(x_NPX.flatten(0, 1), weight_WX).view(tiles, patches, len(weight_WX))
        class_N1W = local(self.class_W).expand(tiles, 1, -1)
        return torch.cat([class_N1W, x_NPW], dim=1) + local(self.position_QW)


def patches_of(pixels_N3SS: Tensor, patch_size: int) -> Tensor:
    """Cut tiles into patches [N, P, X], row by row; a patch's numbers are by channel, row and column."""
    tiles, channels, size, _ = pixels_N3SS.shape
    side = size // patch_size
    cut = pixels_N3SS.view(tiles, channels, side, patch_size, side, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(tiles, side**2, channels * patch_size**2)


class SelfAttention(nn.Module):
    """Softmax attention of every token of a tile to all of them."""

    def __init__(self, config: VisionConfig, gain: float) -> None:
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        self.qkv_3WW = nn.Parameter(torch.empty(3, width, width))
        self.qkv_bias_3W = nn.Parameter(torch.empty(3, width))
        self.initial: dict[str, Initial] = {"qkv_3WW": XAVIER, "qkv_bias_3W": Constant(0.0)}
        self.out_proj = Affine(width, width, Xavier(gain))

    def forward(self, x_NQW: Tensor) -> Tensor:
        """Attend within each tile; [N, Q, W] to [N, Q, W]."""
        tiles, tokens, width = x_NQW.shape
        qkv_T3W = project(x_NQW.flatten(0, 1), local(self.qkv_3WW), local(self.qkv_bias_3W).flatten())
        q_NHQK, k_NHQK, v_NHQK = qkv_T3W.view(tiles, tokens, 3, self.num_heads, width // self.num_heads).permute(
            2, 0, 3, 1, 4
        )
        o_NHQK = F.scaled_dot_product_attention(q_NHQK, k_NHQK, v_NHQK)
        return self.out_proj(o_NHQK.transpose(1, 2).reshape(tiles * tokens, width)).view_as(x_NQW)


class VisionBlock(nn.Module):
    """A layer: x = x + Attention(LayerNorm(x)), then x = x + FeedForward(LayerNorm(x)).

    Attributes:
        recompute: run forward again in backward, and keep the layer's input only.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        gain = 1 / math.sqrt(2 * config.num_layers)  # of what is added to the residual, as in GPT-2 and Megatron
        self.norm1 = LayerNorm(width, config.norm_eps)
        self.attention = SelfAttention(config, gain)
        self.norm2 = LayerNorm(width, config.norm_eps)
        self.fc1 = Affine(width, config.ffn_hidden_size)
        self.fc2 = Affine(config.ffn_hidden_size, width, Xavier(gain))
        self.activation = ACTIVATIONS[config.activation]
        self.recompute = False

    def forward(self, x_NQW: Tensor) -> Tensor:
        """Run the layer over tiles; [N, Q, W] to [N, Q, W]."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x_NQW, use_reentrant=False)
        return self._run(x_NQW)

    def _run(self, x_NQW: Tensor) -> Tensor:
        x_NQW = x_NQW + self.attention(self.norm1(x_NQW))
        h_TF = self.activation(self.fc1(self.norm2(x_NQW).flatten(0, 1)))
        return x_NQW + self.fc2(h_TF).view_as(x_NQW)


class VisionTransformer(nn.Module):
    """CLIP's vision transformer, up to the layer whose hidden states the language model gets.

    It has all layers of the configuration, those too that images do not go through (`unused_layers`): a checkpoint
    has their weights. They are not trained.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config)
        self.pre_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        # Without this, weight decay would shrink them in layouts that have a gradient of zeros for them.
        self.layers[len(self.used_layers) :].requires_grad_(False)

    @property
    def used_layers(self) -> nn.ModuleList:
        """Layers that images go through."""
        return self.layers[: self.config.num_layers - self.config.unused_layers]

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """Return the hidden states [N, Q, W] of normalised tiles, the class token first.

        Args:
            pixels_N3SS: of any float dtype; tiles of the configuration's size.
        """
        x_NQW = self.pre_norm(self.embedding(pixels_N3SS))
        for layer in self.used_layers:
            x_NQW = layer(x_NQW)
        return x_NQW
