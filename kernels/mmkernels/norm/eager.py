"""The passes of both norms in plain torch: float32 inside (float64 for float64 inputs).

Legend: T rows (tokens), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x_TD: Tensor, y_TD: Tensor | None, alpha: float, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(normed, h, rstd_T)``; h is x itself when there is no y."""
    acc = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    h_TD = x_TD if y_TD is None else y_TD.to(acc).add(x_TD, alpha=alpha).to(x_TD.dtype)
    rstd_T = torch.linalg.vector_norm(h_TD, dim=-1, dtype=acc).square_().div_(h_TD.shape[1]).add_(eps).rsqrt_()
    return (h_TD * rstd_T[:, None]).mul_(weight_D).to(x_TD.dtype), h_TD, rstd_T


def backward(
    dnormed_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, alpha: float | None, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dx, dy, dweight)``; with ``alpha`` None there was no sum, and dy is None."""
    unit_TD = h_TD * rstd_T[:, None]
    product_TD = dnormed_TD * unit_TD
    dweight_D = product_TD.sum(0)
    mean_T1 = product_TD.mul_(weight_D).sum(-1, keepdim=True).div_(h_TD.shape[1])
    total_TD = product_TD.copy_(dnormed_TD).mul_(weight_D).addcmul_(unit_TD, mean_T1, value=-1).mul_(rstd_T[:, None])
    if dh_TD is not None:
        total_TD.add_(dh_TD)
    dy_TD = None if alpha is None else total_TD.to(h_TD.dtype, copy=True)
    dx_TD = total_TD if alpha is None else total_TD.mul_(alpha)
    return dx_TD.to(h_TD.dtype), dy_TD, dweight_D.to(weight_D.dtype)
