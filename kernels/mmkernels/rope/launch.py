"""The rotation through the Triton kernel, with its launch shape (all tunables are here).

Legend: T tokens, H heads, K head width, R rotated dimensions, R2 = R / 2.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.rope.kernels import rope_kernel

HEADS_PER_PROGRAM = 32
"""Heads of one token, or of several where a token has fewer: 8 KiB of bfloat16 at a head width of 128."""
PAIRS_PER_THREAD = 8
"""One 16-byte access of each half for 16-bit types."""


def rotate(x_THK: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, inverse: bool) -> Tensor:
    """The rotated heads, contiguous, in the dtype of x; ``inverse`` turns the other way."""
    (tokens, heads, width), half = x_THK.shape, cos_TR2.shape[1]
    out_THK = torch.empty(x_THK.shape, dtype=x_THK.dtype, device=x_THK.device)
    if out_THK.numel() == 0:
        return out_THK
    block_h = min(HEADS_PER_PROGRAM, triton.next_power_of_2(heads))
    block_t, block_half = HEADS_PER_PROGRAM // block_h, triton.next_power_of_2(half)
    with torch.cuda.device_of(x_THK):
        rope_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(heads, block_h))](
            x_THK, cos_TR2, sin_TR2, out_THK, tokens, heads, x_THK.stride(0), x_THK.stride(1),
            cos_TR2.stride(0), sin_TR2.stride(0),
            WIDTH=width, HALF=half, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_HALF=block_half,
            BLOCK_REST=triton.next_power_of_2(max(1, width - 2 * half)), INVERSE=inverse,
            num_warps=max(1, min(8, HEADS_PER_PROGRAM * block_half // (32 * PAIRS_PER_THREAD))),
        )  # fmt: skip
    return out_THK
