"""The passes of the gated norm in plain torch: float32 inside (float64 for float64 inputs).

Legend: T rows (tokens), I columns of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _accumulate_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sum_squares(o_TI: Tensor) -> Tensor:
    """Sum of squares of every row: float32 [T]."""
    return torch.linalg.vector_norm(o_TI, dim=-1, dtype=_accumulate_in(o_TI)).square_()


def forward(
    o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor, eps: float, inv_width: float, sumsq_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output in the dtype of o, and rstd float32 [T]; sums the squares itself when ``sumsq_T`` is None."""
    sumsq_T = sum_squares(o_TI) if sumsq_T is None else sumsq_T
    rstd_T = (sumsq_T * inv_width).add_(eps).rsqrt_()
    y_TI = torch.sigmoid(gate_TI.to(rstd_T.dtype)).mul_(weight_I).mul_(o_TI).mul_(rstd_T[:, None])
    return y_TI.to(o_TI.dtype), rstd_T


def dots(dy_TI: Tensor, o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor) -> Tensor:
    """Sum of dy * sigmoid(gate) * weight * o over every row: float32 [T]."""
    return torch.sigmoid(gate_TI.to(_accumulate_in(o_TI))).mul_(weight_I).mul_(dy_TI).mul_(o_TI).sum(-1)


def backward(
    dy_TI: Tensor,
    o_TI: Tensor,
    gate_TI: Tensor,
    weight_I: Tensor,
    rstd_T: Tensor,
    inv_width: float,
    dot_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """do, dgate in the dtype of o, dweight in that of the weight; sums the dots itself when ``dot_T`` is None."""
    rstd_T1 = rstd_T[:, None]
    sigmoid_TI = torch.sigmoid(gate_TI.to(rstd_T.dtype))
    unit_TI = o_TI * rstd_T1
    dscaled_TI = dy_TI * sigmoid_TI
    product_TI = dscaled_TI * unit_TI
    dweight_I = product_TI.sum(0)
    product_TI.mul_(weight_I)
    mean_T1 = product_TI.sum(-1, keepdim=True) if dot_T is None else dot_T[:, None] * rstd_T1
    do_TI = dscaled_TI.mul_(weight_I).addcmul_(unit_TI, mean_T1 * inv_width, value=-1).mul_(rstd_T1)
    dgate_TI = product_TI.mul_(1 - sigmoid_TI)
    return do_TI.to(o_TI.dtype), dgate_TI.to(o_TI.dtype), dweight_I.to(weight_I.dtype)
