"""Triton kernels of RMSNorm, alone and after a residual sum: a program works on whole rows, arithmetic in float32.

A row lies in the registers of one program, so that each element is read once. Programs step over the rows with a
stride of the whole grid. `STAGES` - 1 rows at a time are copied to shared memory: with 2 the next row is asked for when
this one is done, and another program of the multiprocessor fills the wait; with 3 or more it comes while this one is
worked on. Rows are int64 because T * D may pass 2^31.

Legend: T rows (tokens), D columns, P programs. `BLOCK` is D rounded up to a power of two; `*_stride` is the distance
between rows in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    normed_ptr,
    h_ptr,
    rstd_ptr,
    rows,
    x_stride,
    y_stride,
    alpha,
    inv_width,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write normed = weight * h * rstd and rstd_T; with ADD also h = alpha x + y, else h is x."""
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        h = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            y = tl.load(y_ptr + row * y_stride + cols, mask=mask, other=0.0).to(tl.float32)
            rounded = (alpha * h + y).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + row * WIDTH + cols, rounded, mask=mask)
            h = rounded.to(tl.float32)  # what the backward will read
        rstd = tl.rsqrt(tl.sum(h * h) * inv_width + eps)
        normed = weight * (h * rstd)
        tl.store(normed_ptr + row * WIDTH + cols, normed.to(normed_ptr.dtype.element_ty), mask=mask)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dnormed_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dy_ptr,
    dweight_ptr,
    rows,
    dnormed_stride,
    dh_stride,
    h_stride,
    alpha,
    inv_width,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    HAS_DH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write dx, with ADD dy, and this program's row of dweight_PD; HAS_DH adds a gradient that reached h itself."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        dnormed = tl.load(dnormed_ptr + row * dnormed_stride + cols, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * h_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        # Read for every row, from the L1 cache, the weight takes no registers between. The condition always holds: it
        # keeps the compiler from copying the weight to shared memory with each row.
        weight = tl.zeros([BLOCK], dtype=tl.float32)
        if row < rows:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        unit = h * rstd
        dunit = dnormed * weight
        dweight += dnormed * unit
        mean = tl.sum(dunit * unit) * inv_width
        total = (dunit - unit * mean) * rstd
        if HAS_DH:
            total += tl.load(dh_ptr + row * dh_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            tl.store(dy_ptr + row * WIDTH + cols, total.to(dy_ptr.dtype.element_ty), mask=mask)
            total *= alpha
        tl.store(dx_ptr + row * WIDTH + cols, total.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + program * WIDTH + cols, dweight, mask=mask)
