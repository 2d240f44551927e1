"""The passes of the gated norm through the Triton kernels, with the depth of their pipelines; launch shapes
are in `common/launch_shapes.py`.

Legend: T rows (tokens), I columns of this rank, P programs.
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
from mmkernels.norm_gate import kernels

FORWARD_STAGES, BACKWARD_STAGES = 2, 3


def sum_squares(o_TI: Tensor) -> Tensor:
    """Sum of squares of every row: float32 [T]."""
    rows, width = o_TI.shape
    sumsq_T = torch.empty(rows, dtype=torch.float32, device=o_TI.device)
    if rows:
        grid = (programs(o_TI),)
        with torch.cuda.device_of(o_TI):
            kernels.norm_gate_sum_squares_kernel[grid](
                o_TI, sumsq_T, rows, o_TI.stride(0), STAGES=FORWARD_STAGES, **shape(width, FORWARD_COLUMNS)
            )
    return sumsq_T


def forward(
    o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor, eps: float, inv_width: float, sumsq_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output in the dtype of o, and rstd float32 [T]; sums the squares itself when ``sumsq_T`` is None."""
    rows, width = o_TI.shape
    y_TI = torch.empty(rows, width, dtype=o_TI.dtype, device=o_TI.device)
    rstd_T = torch.empty(rows, dtype=torch.float32, device=o_TI.device)
    if rows:
        grid = (programs(o_TI),)
        with torch.cuda.device_of(o_TI):
            kernels.norm_gate_forward_kernel[grid](
                o_TI, gate_TI, weight_I, sumsq_T, y_TI, rstd_T, rows, o_TI.stride(0), gate_TI.stride(0), inv_width, eps,
                GIVEN=sumsq_T is not None, STAGES=stages(FORWARD_STAGES, 2, o_TI),
                **shape(width, FORWARD_COLUMNS),
            )  # fmt: skip
    return y_TI, rstd_T


def dots(dy_TI: Tensor, o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor) -> Tensor:
    """Sum of dy * sigmoid(gate) * weight * o over every row: float32 [T]."""
    rows, width = o_TI.shape
    dot_T = torch.empty(rows, dtype=torch.float32, device=o_TI.device)
    if rows:
        grid = (programs(o_TI),)
        with torch.cuda.device_of(o_TI):
            kernels.norm_gate_dots_kernel[grid](
                dy_TI, o_TI, gate_TI, weight_I, dot_T, rows, dy_TI.stride(0), o_TI.stride(0), gate_TI.stride(0),
                STAGES=stages(FORWARD_STAGES, 3, o_TI), **shape(width, FORWARD_COLUMNS),
            )  # fmt: skip
    return dot_T


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
    rows, width = o_TI.shape
    do_TI = torch.empty(rows, width, dtype=o_TI.dtype, device=o_TI.device)
    dgate_TI = torch.empty_like(do_TI)
    count = programs(o_TI)
    dweight_PI = torch.empty(count, width, dtype=torch.float32, device=o_TI.device)
    if rows:
        with torch.cuda.device_of(o_TI):
            kernels.norm_gate_backward_kernel[(count,)](
                dy_TI, o_TI, gate_TI, weight_I, rstd_T, dot_T, do_TI, dgate_TI, dweight_PI, rows,
                dy_TI.stride(0), o_TI.stride(0), gate_TI.stride(0), inv_width,
                GIVEN=dot_T is not None, STAGES=stages(BACKWARD_STAGES, 3, o_TI),
                maxnreg=BACKWARD_REGISTERS, **shape(width, BACKWARD_COLUMNS),
            )  # fmt: skip
    return do_TI, dgate_TI, weight_gradient(dweight_PI, weight_I.dtype)
