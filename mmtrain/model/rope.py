"""Rotary position embedding on the first dimensions of each head.

Legend: T tokens, H heads, K head dimension, R rotated dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.rope import partial_rope

RopeTable = tuple[Tensor, Tensor]


def rope_table(position_ids_T: Tensor, rotary_dim: int, base: float) -> RopeTable:
    """Return cosines and sines of position * base^(-2i/R), i = 0 .. R/2 - 1, in fp32 (MiniMax-01 section 2).

    Angles are formed in float64: at a million tokens an fp32 product is off by more than 0.01 rad.

    Returns:
        cos and sin, each fp32 [T, R/2].
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=position_ids_T.device) / rotary_dim
    angle = position_ids_T.double()[:, None] * torch.pow(torch.tensor(base, dtype=torch.float64), -exponent)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x_THK: Tensor, table: RopeTable) -> Tensor:
    """Rotate the first R dimensions of every head, half against half (NeoX order); the rest passes through.

    Args:
        x_THK: queries or keys [T, H, K], any float dtype.
        table: from :func:`rope_table`; R is twice its width, and may be 0.
    """
    cos_TR2, sin_TR2 = table
    return partial_rope(x_THK, cos_TR2, sin_TR2) if cos_TR2.shape[1] else x_THK
