"""The passes of both norms through the Triton kernels, with the depth of their pipelines; launch shapes
are in `common/launch_shapes.py`.

Legend: T rows (tokens), D columns, P programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.launch_shapes import (
    BACKWARD_COLUMNS,
    BACKWARD_REGISTERS,
    FORWARD_COLUMNS,
    programs,
    shape,
    stages,
)
from mmkernels.common.weight_sums import weight_gradient
from mmkernels.norm import kernels

FORWARD_STAGES, BACKWARD_STAGES = 3, 3


def forward(
    x_TD: Tensor, y_TD: Tensor | None, alpha: float, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(normed, h, rstd_T)``; h is x itself when there is no y."""
    rows, width = x_TD.shape
    normed_TD = torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device)
    h_TD = x_TD if y_TD is None else torch.empty_like(normed_TD)
    rstd_T = torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    if rows:
        inputs = 1 if y_TD is None else 2
        with torch.cuda.device_of(x_TD):
            kernels.rms_norm_forward_kernel[(programs(x_TD),)](
                x_TD, y_TD, weight_D, normed_TD, h_TD, rstd_T, rows,
                x_TD.stride(0), 0 if y_TD is None else y_TD.stride(0), alpha, 1.0 / width, eps,
                ADD=y_TD is not None, STAGES=stages(FORWARD_STAGES, inputs, x_TD),
                **shape(width, FORWARD_COLUMNS),
            )  # fmt: skip
    return normed_TD, h_TD, rstd_T


def backward(
    dnormed_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, alpha: float | None, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dx, dy, dweight)``; with ``alpha`` None there was no sum, and dy is None."""
    rows, width = h_TD.shape
    dx_TD = torch.empty(rows, width, dtype=h_TD.dtype, device=h_TD.device)
    dy_TD = None if alpha is None else torch.empty_like(dx_TD)
    count = programs(h_TD)
    dweight_PD = torch.empty(count, width, dtype=torch.float32, device=h_TD.device)
    if rows:
        inputs = 2 if dh_TD is None else 3
        with torch.cuda.device_of(h_TD):
            kernels.rms_norm_backward_kernel[(count,)](
                dnormed_TD, dh_TD, h_TD, weight_D, rstd_T, dx_TD, dy_TD, dweight_PD, rows,
                dnormed_TD.stride(0), 0 if dh_TD is None else dh_TD.stride(0), h_TD.stride(0),
                1.0 if alpha is None else alpha, 1.0 / width, ADD=alpha is not None, HAS_DH=dh_TD is not None,
                STAGES=stages(BACKWARD_STAGES, inputs, h_TD), maxnreg=BACKWARD_REGISTERS,
                **shape(width, BACKWARD_COLUMNS),
            )  # fmt: skip
    return dx_TD, dy_TD, weight_gradient(dweight_PD, weight_D.dtype)
