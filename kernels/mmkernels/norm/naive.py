"""The definitions of both norms, differentiable by plain autograd. They are the oracle of every backend.

Legend: T rows (tokens), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` in float64 (MiniMax-01 section 2, Fig. 3); any floating dtypes in."""
    x, weight = x_TD.double(), weight_D.double()
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def naive_add_rms_norm(x_TD: Tensor, y_TD: Tensor, alpha: float, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``h = alpha x + y`` (the DeepNorm residual) and its norm, ``(normed_TD, h_TD)`` in float64, h not rounded."""
    h_TD = alpha * x_TD.double() + y_TD.double()
    return naive_rms_norm(h_TD, weight_D, eps), h_TD
