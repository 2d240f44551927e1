"""The sum of rows through the Triton kernel, with its launch shape (all tunables are here).

Legend: T tokens, V rows of the table, D columns.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.common.launch_shapes import dividing_block
from mmkernels.embedding.kernels import embedding_add_rows_kernel

BLOCK_T = 32
"""Rows of `dy` that a program reads at once: a frequent token has thousands, which one program a block of columns adds.
It keeps as many sums of each column, which it adds up at the end."""
BLOCK_D = 128
"""Columns of a program; few, so that a frequent token's row is the work of many programs."""
WARPS = 4


def add(total_VD: Tensor, tokens_T: Tensor, dy_TD: Tensor) -> None:
    """Add to `total` the rows of `dy` that its rows' tokens name; neither is empty."""
    (vocabulary, width), tokens = total_VD.shape, tokens_T.shape[0]
    if dy_TD.stride(1) != 1:  # the gradient of a sum is one expanded number
        dy_TD = dy_TD.contiguous()
    with torch.cuda.device_of(total_VD):
        sorted_T, position_T = tokens_T.sort(stable=True)  # stable: the order of a token's rows is fixed
        end_T = torch.searchsorted(sorted_T, sorted_T, right=True, out_int32=True)
        block = dividing_block(width, BLOCK_D)
        embedding_add_rows_kernel[(tokens * triton.cdiv(width, block),)](
            total_VD, sorted_T, position_T, end_T, dy_TD, vocabulary, dy_TD.stride(0),
            WIDTH=width, BLOCK_T=BLOCK_T, BLOCK_D=block, num_warps=WARPS,
        )  # fmt: skip
