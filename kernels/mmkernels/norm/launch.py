"""The passes of both norms through the Triton kernels, with the launch shapes (all tunables are here).

Legend: T rows (tokens), D columns, P programs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.norm import kernel

# Columns of a row that a thread holds, and columns that the programs of one multiprocessor hold at a time: two programs
# of 8192, so that one works while the other waits. The forward has 64 registers a thread for that; the backward, which
# keeps dweight too, takes half the threads and 128.
FORWARD_COLUMNS, BACKWARD_COLUMNS = 16, 32
BACKWARD_REGISTERS = 128
COLUMNS_PER_SM = 16384
FORWARD_STAGES, BACKWARD_STAGES = 3, 3
STAGE_BYTES = 110 * 1024
"""Shared memory that the copies ahead of one program of 8192 columns may take, half of what there is."""


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
            kernel.forward_kernel[(_programs(x_TD),)](
                x_TD, y_TD, weight_D, normed_TD, h_TD, rstd_T, rows,
                x_TD.stride(0), 0 if y_TD is None else y_TD.stride(0), alpha, 1.0 / width, eps,
                ADD=y_TD is not None, STAGES=_stages(FORWARD_STAGES, inputs, x_TD),
                **_shape(width, FORWARD_COLUMNS),
            )  # fmt: skip
    return normed_TD, h_TD, rstd_T


def backward(
    dnormed_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, alpha: float | None, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dx, dy, dweight)``; with ``alpha`` None there was no sum, and dy is None."""
    rows, width = h_TD.shape
    dx_TD = torch.empty(rows, width, dtype=h_TD.dtype, device=h_TD.device)
    dy_TD = None if alpha is None else torch.empty_like(dx_TD)
    programs = _programs(h_TD)
    dweight_PD = torch.empty(programs, width, dtype=torch.float32, device=h_TD.device)
    if rows:
        inputs = 2 if dh_TD is None else 3
        with torch.cuda.device_of(h_TD):
            kernel.backward_kernel[(programs,)](
                dnormed_TD, dh_TD, h_TD, weight_D, rstd_T, dx_TD, dy_TD, dweight_PD, rows,
                dnormed_TD.stride(0), 0 if dh_TD is None else dh_TD.stride(0), h_TD.stride(0),
                1.0 if alpha is None else alpha, 1.0 / width, ADD=alpha is not None, HAS_DH=dh_TD is not None,
                STAGES=_stages(BACKWARD_STAGES, inputs, h_TD), maxnreg=BACKWARD_REGISTERS,
                **_shape(width, BACKWARD_COLUMNS),
            )  # fmt: skip
    return dx_TD, dy_TD, dweight_PD.sum(0).to(weight_D.dtype)


def _shape(width: int, columns: int) -> dict[str, int]:
    """Block and warps for rows of ``width`` columns, ``columns`` of them to a thread."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, min(32, block // (32 * columns)))}


def _stages(most: int, inputs: int, x_TD: Tensor) -> int:
    """Pipeline depth: each stage but the first keeps one more row of each input in shared memory. 2 always fits."""
    row_bytes = inputs * x_TD.element_size() * triton.next_power_of_2(x_TD.shape[1])
    return min(most, max(2, 1 + STAGE_BYTES // row_bytes))


def _programs(x_TD: Tensor) -> int:
    """Programs that fill the device once, at most one a row. The interpreter gets few, so that each sees many rows."""
    rows, width = x_TD.shape
    if not x_TD.is_cuda:
        return min(rows, 3)
    processors = torch.cuda.get_device_properties(x_TD.device).multi_processor_count
    return min(rows, processors * max(1, COLUMNS_PER_SM // triton.next_power_of_2(width)))
