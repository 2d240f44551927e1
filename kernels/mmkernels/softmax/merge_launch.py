"""The join of two blocks' results through the Triton kernel, with its launch shape (all tunables are here).

Legend: T queries, H heads, D head width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.softmax.merge_kernel import softmax_merge_kernel

ELEMENTS_PER_PROGRAM = 4096
"""Of each output: 32 queries at a head width of 128."""
ELEMENTS_PER_THREAD = 16
"""Two 16-byte accesses for 16-bit types."""


def merge(o_THD: Tensor, lse_HT: Tensor, part_THD: Tensor, part_lse_HT: Tensor) -> None:
    """Add a block's part to the output and log-sum-exp of other keys, in place."""
    tokens, heads, width = o_THD.shape
    block_d = triton.next_power_of_2(width)
    block_t = max(1, min(ELEMENTS_PER_PROGRAM // block_d, triton.next_power_of_2(tokens)))
    with torch.cuda.device_of(o_THD):
        softmax_merge_kernel[(triton.cdiv(tokens, block_t), heads)](
            o_THD, lse_HT, part_THD, part_lse_HT, tokens, o_THD.stride(0), o_THD.stride(1), *lse_HT.stride(),
            part_THD.stride(0), part_THD.stride(1), *part_lse_HT.stride(),
            WIDTH=width, BLOCK_T=block_t, BLOCK_D=block_d,
            num_warps=max(1, min(8, block_t * block_d // (32 * ELEMENTS_PER_THREAD))),
        )  # fmt: skip
