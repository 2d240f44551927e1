"""Triton kernels of products with int8 weights: one for a weight of all rows, and for experts with a weight each; one
for a single row.

Legend: M rows of x, N outputs, K inputs, G groups of columns, E experts. A program makes BLOCK_M rows of BLOCK_N
outputs. The weight is the left operand of `tl.dot`, so that few rows, as of a decode step, take the narrow side of the
tensor cores' products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.common.triton_support import INTERPRETED

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit(do_not_specialize=["count", "tiles"])
def int8_product_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    offset_ptr,
    y_ptr,
    count,
    tiles,
    stride_x,
    stride_e,
    stride_n,
    stride_scale_e,
    stride_scale_n,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """y[split, m, n] = sum over the split's k of x[m, k] values[n, k] scale[n, k // GROUP].

    Grid: (tiles * ceil(N / BLOCK_N), splits), programs of the same weights one after the other. `count` is the rows
    of x. A split has STEPS blocks of K. GROUP is 0 for a scale a row; else BLOCK_K divides it. EXPERTS is 0 for one
    weight; else `offset` has the row after each expert's last, and tiles are enough for however rows are shared out.
    """
    tile = tl.program_id(0) % tiles
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first, end = tile * BLOCK_M, count
    expert = 0
    if EXPERTS > 0:
        e = tl.arange(0, EXPERT_BLOCK)
        end_E = tl.load(offset_ptr + e, mask=e < EXPERTS, other=0)
        begin_E = tl.load(offset_ptr + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
        tiles_E = (end_E - begin_E + BLOCK_M - 1) // BLOCK_M
        expert = tl.sum((tl.cumsum(tiles_E, 0) <= tile).to(tl.int32), 0)
        if expert >= EXPERTS:
            return
        before = tl.sum(tl.where(e < expert, tiles_E, 0), 0)
        first = tl.sum(tl.where(e == expert, begin_E, 0), 0) + (tile - before) * BLOCK_M
        end = tl.sum(tl.where(e == expert, end_E, 0), 0)
    m = first + tl.arange(0, BLOCK_M)
    m_read, n_read = m < end, n < N
    m, n = m.to(tl.int64), n.to(tl.int64)  # elements of a weight, and of many rows, pass 2^31
    x_row = x_ptr + m * stride_x
    w_row = values_ptr + tl.cast(expert, tl.int64) * stride_e + n * stride_n
    scale_row = scale_ptr + tl.cast(expert, tl.int64) * stride_scale_e + n * stride_scale_n
    acc_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(STEPS):
        begin = (split * STEPS + step) * BLOCK_K
        k = begin + tl.arange(0, BLOCK_K)
        # Both operands are masked past K: what lies there may be NaN, which no zero takes away.
        w_NK = tl.load(w_row[:, None] + k[None, :], mask=n_read[:, None] & (k < K)[None, :], other=0)
        x_KM = tl.load(x_row[None, :] + k[:, None], mask=m_read[None, :] & (k < K)[:, None], other=0.0)
        if _INTERPRETED:  # numpy has no bfloat16: the interpreter would multiply the bit patterns
            x_KM = x_KM.to(tl.float32)
        w_NK = w_NK.to(x_KM.dtype)  # exact: whole numbers up to 127
        if GROUP > 0:
            scale_N = tl.load(
                scale_row + begin // GROUP, mask=n_read & (tl.broadcast_to(begin, [BLOCK_N]) < K), other=0.0
            )
            acc_NM += tl.dot(w_NK, x_KM, input_precision="ieee") * scale_N[:, None]
        else:
            acc_NM = tl.dot(w_NK, x_KM, acc_NM, input_precision="ieee")
    if GROUP == 0:
        acc_NM *= tl.load(scale_row, mask=n_read, other=0.0)[:, None]
    out = y_ptr + (tl.cast(split, tl.int64) * count + m[None, :]) * N + n[:, None]
    tl.store(out, acc_NM.to(y_ptr.dtype.element_ty), mask=n_read[:, None] & m_read[None, :])


@triton.jit(do_not_specialize=["outputs"])
def int8_row_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    y_ptr,
    outputs,
    stride_n,
    stride_scale_n,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """y[n] = sum over k of x[k] values[n, k] scale[n, k // GROUP], for one row of x, without tensor cores.

    Grid: (ceil(outputs / BLOCK_N),). GROUP is 0 for a scale a row; else it divides BLOCK_K.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_read, n = n < outputs, n.to(tl.int64)
    w_row, scale_row = values_ptr + n * stride_n, scale_ptr + n * stride_scale_n
    acc_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # Told here, the stages are of all loads: a launch's are of those alone that tensor cores wait for.
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = begin + tl.arange(0, BLOCK_K)
        w_NK = tl.load(w_row[:, None] + k[None, :], mask=n_read[:, None] & (k < K)[None, :], other=0)
        x_K = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        product_NK = _floats(w_NK) * x_K[None, :]
        if GROUP > 0:
            g = begin // GROUP + tl.arange(0, BLOCK_K // GROUP)
            read = n_read[:, None] & (g * GROUP < K)[None, :]
            scale_NG = tl.load(scale_row[:, None] + g[None, :], mask=read, other=0.0)
            product_NGK = product_NK.reshape(BLOCK_N, BLOCK_K // GROUP, GROUP) * scale_NG[:, :, None]
            product_NK = product_NGK.reshape(BLOCK_N, BLOCK_K)
        acc_NK += product_NK
    y_N = tl.sum(acc_NK, 1)
    if GROUP == 0:
        y_N *= tl.load(scale_row, mask=n_read, other=0.0)
    tl.store(y_ptr + n, y_N.to(y_ptr.dtype.element_ty), mask=n_read)


@triton.jit
def _floats(w):
    """int8 as fp32: the number 2^23 + 128 + w has w + 128 in its last bits.

    These operations in place of a conversion: 14.3 us in place of 16.6 for 4,096 x 11,264 on an H200.
    """
    shifted = (w.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32)
    return (shifted | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def int8_join_kernel(part_ptr, y_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Y = the sum of SPLITS parts of `count` elements each, in fp32, from the first to the last; rounded once.

    Grid: (ceil(count / BLOCK),).
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    read = place < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(part_ptr + tl.cast(split, tl.int64) * count + place, mask=read, other=0.0)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=read)


@triton.jit(do_not_specialize=["rows"])
def int8_dequantise_kernel(
    values_ptr,
    scale_ptr,
    w_ptr,
    rows,
    stride_n,
    stride_scale_n,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """w[n, k] = values[n, k] scale[n, k // GROUP], in fp32, rounded once. GROUP is 0 for a scale a row.

    Grid: (ceil(rows / BLOCK_N), ceil(K / BLOCK_K)).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n_read, read = n < rows, (n < rows)[:, None] & (k < K)[None, :]
    n = n.to(tl.int64)
    w_NK = tl.load(values_ptr + n[:, None] * stride_n + k[None, :], mask=read, other=0).to(tl.float32)
    if GROUP > 0:
        w_NK *= tl.load(scale_ptr + n[:, None] * stride_scale_n + k[None, :] // GROUP, mask=read, other=0.0)
    else:
        w_NK *= tl.load(scale_ptr + n * stride_scale_n, mask=n_read, other=0.0)[:, None]
    tl.store(w_ptr + n[:, None] * K + k[None, :], w_NK.to(w_ptr.dtype.element_ty), mask=read)
