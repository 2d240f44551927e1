"""RMSNorm, computed in fp32.

Legend: T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension (MiniMax-01 section 2, Fig. 3)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalise the last dimension of x [..., D]; any float dtype in, the same out."""
        return rms_norm(x_TD, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Width and epsilon, for printing the module."""
        return f"{self.weight.numel()}, eps={self.eps}"


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm through the fastest path of the device: torch's fused kernel on CUDA, a short autograd pair on CPU."""
    if x_TD.is_cuda:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    return _CpuRMSNorm.apply(x_TD, weight_D, eps)


class _CpuRMSNorm(torch.autograd.Function):
    """torch composes RMSNorm on CPU from elementwise operations; this saves one statistic and passes over x less."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_stat_dtype(x))
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        unit = x * rstd
        product = dy * unit
        mean = (product @ weight.to(product.dtype)).div_(width).unsqueeze(-1)
        dx = (dy * weight).to(unit.dtype).addcmul_(unit, mean, value=-1).mul_(rstd)
        dweight = product.reshape(-1, width).sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def _stat_dtype(x: Tensor) -> torch.dtype:
    """Statistics are fp32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
