"""The partial rotary embedding in one Triton kernel: x is read once, the result written once.

Legend: T tokens, H heads, K head width (`WIDTH`), R rotated dimensions, R2 = R / 2 (`HALF`). A program takes
BLOCK_T x BLOCK_H heads whole; the two halves of R and the rest are separate tiles, each padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    heads,
    x_stride_t,
    x_stride_h,
    cos_stride,
    sin_stride,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INVERSE: tl.constexpr,
) -> None:
    """Write the rotated heads, contiguous; INVERSE turns the other way, which is the backward."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)
    in_heads = (t < tokens)[:, None, None] & (h < heads)[None, :, None]
    x_ptrs = x_ptr + t[:, None, None] * x_stride_t + h[None, :, None] * x_stride_h
    out_ptrs = out_ptr + (t[:, None, None] * heads + h[None, :, None]) * WIDTH
    in_half = in_heads & (i < HALF)[None, None, :]
    first = tl.load(x_ptrs + i[None, None, :], mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF + i[None, None, :], mask=in_half, other=0.0).to(tl.float32)
    in_table = (t < tokens)[:, None] & (i < HALF)[None, :]
    cos = tl.load(cos_ptr + t[:, None] * cos_stride + i[None, :], mask=in_table, other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + t[:, None] * sin_stride + i[None, :], mask=in_table, other=0.0)[:, None, :]
    if INVERSE:
        sin = -sin
    turned = (first * cos - second * sin).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs + i[None, None, :], turned, mask=in_half)
    turned = (second * cos + first * sin).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs + HALF + i[None, None, :], turned, mask=in_half)
    if WIDTH > 2 * HALF:
        j = 2 * HALF + tl.arange(0, BLOCK_REST)
        in_rest = in_heads & (j < WIDTH)[None, None, :]
        rest = tl.load(x_ptrs + j[None, None, :], mask=in_rest, other=0.0)
        tl.store(out_ptrs + j[None, None, :], rest, mask=in_rest)
