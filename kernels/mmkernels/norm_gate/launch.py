"""The passes of the gated norm through the Triton kernels, with the launch shapes (all tunables are here).

Legend: T rows (tokens), I columns of this rank, P programs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.norm_gate import kernel

# Columns of a row that a thread holds, and columns that the programs of one multiprocessor hold at a time: two programs
# of 8192, so that one works while the other waits. The forward has 64 registers a thread for that; the backward, which
# keeps dweight too, takes half the threads and 128.
FORWARD_COLUMNS, BACKWARD_COLUMNS = 16, 32
BACKWARD_REGISTERS = 128
COLUMNS_PER_SM = 16384
FORWARD_STAGES, BACKWARD_STAGES = 2, 3
STAGE_BYTES = 110 * 1024
"""Shared memory that the copies ahead of one program of 8192 columns may take, half of what there is."""


def sum_squares(o_TI: Tensor) -> Tensor:
    """Sum of squares of every row: float32 [T]."""
    rows, width = o_TI.shape
    sumsq_T = torch.empty(rows, dtype=torch.float32, device=o_TI.device)
    if rows:
        grid = (_programs(o_TI),)
        with torch.cuda.device_of(o_TI):
            kernel.sum_squares_kernel[grid](
                o_TI, sumsq_T, rows, o_TI.stride(0), STAGES=FORWARD_STAGES, **_shape(width, FORWARD_COLUMNS)
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
        grid = (_programs(o_TI),)
        with torch.cuda.device_of(o_TI):
            kernel.forward_kernel[grid](
                o_TI, gate_TI, weight_I, sumsq_T, y_TI, rstd_T, rows, o_TI.stride(0), gate_TI.stride(0), inv_width, eps,
                GIVEN=sumsq_T is not None, STAGES=_stages(FORWARD_STAGES, 2, o_TI),
                **_shape(width, FORWARD_COLUMNS),
            )  # fmt: skip
    return y_TI, rstd_T


def dots(dy_TI: Tensor, o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor) -> Tensor:
    """Sum of dy * sigmoid(gate) * weight * o over every row: float32 [T]."""
    rows, width = o_TI.shape
    dot_T = torch.empty(rows, dtype=torch.float32, device=o_TI.device)
    if rows:
        grid = (_programs(o_TI),)
        with torch.cuda.device_of(o_TI):
            kernel.dots_kernel[grid](
                dy_TI, o_TI, gate_TI, weight_I, dot_T, rows, dy_TI.stride(0), o_TI.stride(0), gate_TI.stride(0),
                STAGES=_stages(FORWARD_STAGES, 3, o_TI), **_shape(width, FORWARD_COLUMNS),
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
    programs = _programs(o_TI)
    dweight_PI = torch.empty(programs, width, dtype=torch.float32, device=o_TI.device)
    if rows:
        with torch.cuda.device_of(o_TI):
            kernel.backward_kernel[(programs,)](
                dy_TI, o_TI, gate_TI, weight_I, rstd_T, dot_T, do_TI, dgate_TI, dweight_PI, rows,
                dy_TI.stride(0), o_TI.stride(0), gate_TI.stride(0), inv_width,
                GIVEN=dot_T is not None, STAGES=_stages(BACKWARD_STAGES, 3, o_TI),
                maxnreg=BACKWARD_REGISTERS, **_shape(width, BACKWARD_COLUMNS),
            )  # fmt: skip
    return do_TI, dgate_TI, dweight_PI.sum(0).to(weight_I.dtype)


def _shape(width: int, columns: int) -> dict[str, int]:
    """Block and warps for rows of ``width`` columns, ``columns`` of them to a thread."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, min(32, block // (32 * columns)))}


def _stages(most: int, inputs: int, o_TI: Tensor) -> int:
    """Pipeline depth: each stage but the first keeps one more row of each input in shared memory. 2 always fits."""
    row_bytes = inputs * o_TI.element_size() * triton.next_power_of_2(o_TI.shape[1])
    return min(most, max(2, 1 + STAGE_BYTES // row_bytes))


def _programs(o_TI: Tensor) -> int:
    """Programs that fill the device once, at most one a row. The interpreter gets few, so that each sees many rows."""
    rows, width = o_TI.shape
    if not o_TI.is_cuda:
        return min(rows, 3)
    processors = torch.cuda.get_device_properties(o_TI.device).multi_processor_count
    return min(rows, processors * max(1, COLUMNS_PER_SM // triton.next_power_of_2(width)))
