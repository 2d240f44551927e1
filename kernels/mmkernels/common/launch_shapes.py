"""Launch shapes that several ops share: of programs that hold whole rows (both norms), and of blocks of a row.

Legend: T rows (tokens), D columns.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# Columns of a row that a thread holds, and columns that the programs of one multiprocessor hold at a time: two programs
# of 8192, so that one works while the other waits. The forward has 64 registers a thread for that; the backward, which
# keeps dweight too, takes half the threads and 128.
FORWARD_COLUMNS, BACKWARD_COLUMNS = 16, 32
BACKWARD_REGISTERS = 128
COLUMNS_PER_SM = 16384
STAGE_BYTES = 110 * 1024
"""Shared memory that the copies ahead of one program of 8192 columns may take, half of what there is."""


def shape(width: int, columns: int) -> dict[str, int]:
    """Block and warps for rows of ``width`` columns, ``columns`` of them to a thread."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": max(1, min(32, block // (32 * columns)))}


def stages(most: int, inputs: int, x_TD: Tensor) -> int:
    """Pipeline depth: each stage but the first keeps one more row of each input in shared memory. 2 always fits."""
    row_bytes = inputs * x_TD.element_size() * triton.next_power_of_2(x_TD.shape[1])
    return min(most, max(2, 1 + STAGE_BYTES // row_bytes))


def programs(x_TD: Tensor) -> int:
    """Programs that fill the device once, at most one a row. The interpreter gets few, so that each sees many rows."""
    rows, width = x_TD.shape
    if not x_TD.is_cuda:
        return min(rows, 3)
    processors = torch.cuda.get_device_properties(x_TD.device).multi_processor_count
    return min(rows, processors * max(1, COLUMNS_PER_SM // triton.next_power_of_2(width)))


def dividing_block(width: int, most: int) -> int:
    """Elements of a row of this width that a program takes: the largest block that divides it, unless that were small.

    Args:
        width: elements of a row.
        most: the largest block, a power of two.
    """
    divisor = width & -width
    if divisor >= most // 4:
        return min(divisor, most)
    return max(16, min(most, triton.next_power_of_2(width)))
