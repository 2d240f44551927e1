"""Sum of the parts of a norm weight's gradient that the programs of a backward kernel leave.

Legend: P programs, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P, BLOCK_D, WARPS, STAGES = 128, 32, 4, 4
"""Parts and columns of a block, its warps and the blocks under way. There are up to 2,112 parts on an H200 (1,024
columns), for which torch's sum over the first dimension takes 16 us."""


@triton.jit(do_not_specialize=["parts"])
def norm_weight_sums_kernel(
    part_ptr, sum_ptr, parts, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr
) -> None:
    """sum[d] = sum over p of part[p, d], in float32, in one order. Grid: (ceil(WIDTH / BLOCK_D),)."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in tl.range(0, parts, BLOCK_P, num_stages=STAGES):
        p = first + tl.arange(0, BLOCK_P)
        read = (p < parts)[:, None] & (d < WIDTH)[None, :]
        acc_PD += tl.load(part_ptr + p[:, None] * WIDTH + d[None, :], mask=read, other=0.0)
    tl.store(sum_ptr + d, tl.sum(acc_PD, 0).to(sum_ptr.dtype.element_ty), mask=d < WIDTH)


def weight_gradient(part_PD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the programs [D] in a dtype, rounded once, of parts in float32."""
    parts, width = part_PD.shape
    sum_D = torch.empty(width, dtype=dtype, device=part_PD.device)
    with torch.cuda.device_of(part_PD):
        norm_weight_sums_kernel[(triton.cdiv(width, BLOCK_D),)](
            part_PD, sum_D, parts, WIDTH=width, BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D, STAGES=STAGES, num_warps=WARPS
        )
    return sum_D
