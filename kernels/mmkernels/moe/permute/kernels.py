"""Triton kernels that move rows between tokens and experts: gathers and plain stores, no atomics.

One program moves one token, or a block of its row. Rows past the kept ones are unused: as there are at most T * K,
each token clears K of them.

Legend: T tokens, D model width, E experts, K experts a token, R rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mask(d, row, limit, D: tl.constexpr) -> tl.tensor:
    """Columns d of a row that is there, 0 <= row < limit."""
    # Broadcast, then compare: the interpreter broadcasts a scalar comparison to int32, which is no mask.
    row_D = tl.broadcast_to(row, d.shape)
    return (d < D) & (row_D >= 0) & (row_D < limit)


@triton.jit(do_not_specialize=["T", "R"])
def permute_kernel(
    x_ptr,
    y_ptr,
    row_ptr,
    offset_ptr,
    T,
    R,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLEAR: tl.constexpr,
) -> None:
    """y[row] = x[t]; unused rows become zero if CLEAR. Grid: T * ceil(D / BLOCK_D)."""
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = tl.program_id(0) // BLOCKS
    d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + t.to(tl.int64) * D + d, mask=d < D)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + t * K + k)
        tl.store(y_ptr + row.to(tl.int64) * D + d, x, mask=_mask(d, row, R, D))
    if CLEAR:
        kept = tl.load(offset_ptr + E - 1)
        for k in tl.static_range(K):
            unused = kept + k * T + t
            zero = tl.zeros([BLOCK_D], y_ptr.dtype.element_ty)
            tl.store(y_ptr + unused.to(tl.int64) * D + d, zero, mask=_mask(d, unused, R, D))


@triton.jit(do_not_specialize=["R"])
def unpermute_gather_kernel(
    y_ptr,
    weight_ptr,
    out_ptr,
    row_ptr,
    R,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SKIP: tl.constexpr,
) -> None:
    """out[t] = sum over k of weight * y[row] (weight 1 unless WEIGHTED), in fp32. Grid: T * ceil(D / BLOCK_D).

    With SKIP, a token whose last row is -1 is left out.
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = tl.program_id(0) // BLOCKS
    d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + t * K + k)
        y = tl.load(y_ptr + row.to(tl.int64) * D + d, mask=_mask(d, row, R, D), other=0.0).to(tl.float32)
        if WEIGHTED:
            # A dropped assignment adds nothing even if its weight is NaN.
            y *= tl.where(row >= 0, tl.load(weight_ptr + t * K + k), 0.0)
        total += y
    written = _mask(d, row, R, D) if SKIP else d < D
    tl.store(out_ptr + t.to(tl.int64) * D + d, total.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["T", "R"])
def unpermute_grad_kernel(
    do_ptr,
    y_ptr,
    weight_ptr,
    dy_ptr,
    dweight_ptr,
    row_ptr,
    offset_ptr,
    T,
    R,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLEAR: tl.constexpr,
) -> None:
    """dy[row] = weight * do[t] and dweight = <y[row], do[t]>; unused rows of dy become zero if CLEAR. Grid: T.

    A program walks along one token's rows, all K side by side, and sums over them once, at the end.
    """
    t = tl.program_id(0)
    k = tl.arange(0, KP)
    row_K = tl.load(row_ptr + t * K + k, mask=k < K, other=-1)
    weight_K = tl.load(weight_ptr + t * K + k, mask=k < K, other=0.0)
    if CLEAR:
        unused_K = tl.where(k < K, tl.load(offset_ptr + E - 1) + k * T + t, R)
    product_KD = tl.zeros([KP, BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = (d < D)[None, :]
        at = row_K.to(tl.int64)[:, None] * D + d[None, :]
        kept = inside & (row_K >= 0)[:, None] & (row_K < R)[:, None]
        do = tl.load(do_ptr + t.to(tl.int64) * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=kept, other=0.0).to(tl.float32)
        tl.store(dy_ptr + at, (weight_K[:, None] * do).to(dy_ptr.dtype.element_ty), mask=kept)
        if CLEAR:
            zero = tl.zeros([KP, BLOCK_D], dy_ptr.dtype.element_ty)
            unused = inside & (unused_K < R)[:, None]
            tl.store(dy_ptr + unused_K.to(tl.int64)[:, None] * D + d[None, :], zero, mask=unused)
        product_KD += y * do
    dweight_K = tl.where(row_K >= 0, tl.sum(product_KD, axis=1), 0.0)
    tl.store(dweight_ptr + t * K + k, dweight_K, mask=k < K)
