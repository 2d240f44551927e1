"""RMSNorm, computed in fp32.

Legend: T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.norm import add_rms_norm, rms_norm
from mmtrain.model.initial import Constant, Initial
from mmtrain.model.weights import local


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension (MiniMax-01 section 2, Fig. 3)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.initial: dict[str, Initial] = {"weight": Constant(1.0)}
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalise every row of x [T, D], of any float dtype, which the result has too."""
        return rms_norm(x_TD, local(self.weight), self.eps)

    def after_residual(self, residual_TD: Tensor, out_TD: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Return RMSNorm(h) and h = alpha * residual + out, each [T, D], in one pass."""
        return add_rms_norm(residual_TD, out_TD, alpha, local(self.weight), self.eps)

    def extra_repr(self) -> str:
        """Width and epsilon, for printing the module."""
        return f"{self.weight.numel()}, eps={self.eps}"
