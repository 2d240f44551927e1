"""The definition of the partial rotary embedding, differentiable by plain autograd. It is the oracle of every backend.

Legend: T tokens, H heads, K head width, R rotated dimensions, R2 = R / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_partial_rope(x_THK: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
    """Turn each pair ``(x_i, x_{i + R/2})``, i < R/2, by its angle; pass dimensions from R on through. In float64."""
    x, cos, sin = x_THK.double(), cos_TR2.double()[:, None], sin_TR2.double()[:, None]
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
