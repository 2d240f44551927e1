"""The passes of both norms through the Triton kernels, with the launch shapes (all tunables are here).

Legend: T rows (tokens), D columns, P programs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.norm import kernel

COLUMNS_PER_THREAD = 16
# Columns that the programs of one multiprocessor hold at a time, by the registers that ptxas gives a thread.
FORWARD_COLUMNS_PER_SM = 16384
BACKWARD_COLUMNS_PER_SM = 8192
FORWARD_STAGES = 2
BACKWARD_STAGES = 3
STAGE_BYTES = 110 * 1024
"""Shared memory that the copies ahead of one program may take."""


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
            kernel.forward_kernel[(_programs(x_TD, FORWARD_COLUMNS_PER_SM),)](
                x_TD, y_TD, weight_D, normed_TD, h_TD, rstd_T, rows,
                x_TD.stride(0), 0 if y_TD is None else y_TD.stride(0), alpha, 1.0 / width, eps,
                ADD=y_TD is not None, STAGES=_stages(FORWARD_STAGES, inputs * x_TD.element_size() * width),
                **_shape(width),
            )  # fmt: skip
    return normed_TD, h_TD, rstd_T


def backward(
    dnormed_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, alpha: float | None, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dx, dy, dweight)``; with ``alpha`` None there was no sum, and dy is None."""
    rows, width = h_TD.shape
    dx_TD = torch.empty(rows, width, dtype=h_TD.dtype, device=h_TD.device)
    dy_TD = None if alpha is None else torch.empty_like(dx_TD)
    programs = _programs(h_TD, BACKWARD_COLUMNS_PER_SM)
    dweight_PD = torch.empty(programs, width, dtype=torch.float32, device=h_TD.device)
    if rows:
        inputs = 2 if dh_TD is None else 3
        with torch.cuda.device_of(h_TD):
            kernel.backward_kernel[(programs,)](
                dnormed_TD, dh_TD, h_TD, weight_D, rstd_T, dx_TD, dy_TD, dweight_PD, rows,
                dnormed_TD.stride(0), 0 if dh_TD is None else dh_TD.stride(0), h_TD.stride(0),
                1.0 if alpha is None else alpha, 1.0 / width, ADD=alpha is not None, HAS_DH=dh_TD is not None,
                STAGES=_stages(BACKWARD_STAGES, inputs * h_TD.element_size() * width), **_shape(width),
            )  # fmt: skip
    return dx_TD, dy_TD, dweight_PD.sum(0).to(weight_D.dtype)


def _shape(width: int) -> dict[str, int]:
    """Block and warps for rows of ``width`` columns."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, min(32, block // (32 * COLUMNS_PER_THREAD)))}


def _stages(most: int, row_bytes: int) -> int:
    """Pipeline depth: each stage but the first keeps one more row in shared memory. 2 always fits."""
    return min(most, max(2, 1 + STAGE_BYTES // row_bytes))


def _programs(x_TD: Tensor, columns_per_sm: int) -> int:
    """Programs that fill the device once, at most one a row. The interpreter gets few, so that each sees many rows."""
    rows, width = x_TD.shape
    if not x_TD.is_cuda:
        return min(rows, 3)
    processors = torch.cuda.get_device_properties(x_TD.device).multi_processor_count
    return min(rows, processors * max(1, columns_per_sm // triton.next_power_of_2(width)))
