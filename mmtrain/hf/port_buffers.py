"""Decays of lightning attention as transformers' port keeps them: buffers of a layer, which it takes from the files.

Left to itself the port derives other slopes than the released code does where the number of heads is no power of two
(the released code interpolates, as ALiBi does), and in the last layer (1 - l / (L - 1 + 1e-5) in place of
1 - l / (L - 1)). With the buffers in the files it computes with ours, which are the released code's.

Legend: H heads, B tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmtrain.config import ModelConfig
from mmtrain.model.mixers.lightning import decay_slopes
from mmtrain.model.mixers.registry import LIGHTNING

BLOCK = 256  # `block_size` of the configuration


def buffer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the buffers of all lightning layers, by name."""
    heads = model.num_heads
    kinds = {
        "slope_rate": (heads, 1, 1), "query_decay": (heads, BLOCK, 1), "key_decay": (heads, BLOCK, 1),
        "diagonal_decay": (1, heads, BLOCK, BLOCK),
    }  # fmt: skip
    layers = [i for i, letter in enumerate(model.layer_types) if letter == LIGHTNING.letter]
    return {f"model.layers.{i}.self_attn.{kind}": shape for i in layers for kind, shape in kinds.items()}


def make_buffer(model: ModelConfig, name: str) -> Tensor:
    """Return a buffer by its name, fp32, formed in float64.

    Token i = 1..B of a block sees the state before the block through exp(-s i), leaves exp(-s (B - i)) of itself to the
    state after it, and sees token j <= i through exp(-s (i - j)).
    """
    layer, kind = int(name.split(".")[2]), name.rpartition(".")[2]
    s_H11 = torch.tensor(decay_slopes(model.num_heads, layer, model.num_layers), dtype=torch.float64)[:, None, None]
    i_B1 = torch.arange(1, BLOCK + 1, dtype=torch.float64)[:, None]
    if kind == "slope_rate":
        return s_H11.float()
    if kind == "query_decay":
        return torch.exp(-s_H11 * i_B1).float()
    if kind == "key_decay":
        return torch.exp(-s_H11 * (BLOCK - i_B1)).float()
    kept_HB = torch.exp(-s_H11[:, 0] * torch.arange(BLOCK, dtype=torch.float64)).float()  # by how far j lies before i
    later_HB = torch.zeros(model.num_heads, BLOCK - 1)  # nothing, where j lies after i
    return torch.cat([later_HB, kept_HB], dim=1).unfold(1, BLOCK, 1).flip(-1)[None]
