"""Triton kernels of the gated norm: a program works on whole rows, all arithmetic in float32.

A row lies in the registers of one program, so that each element is read once. Programs step over the rows with a
stride of the whole grid. `STAGES` - 1 rows at a time are copied to shared memory: with 2 the next row is asked for when
this one is done, and another program of the multiprocessor fills the wait; with 3 or more it comes while this one is
worked on. Rows are int64 because T * I may pass 2^31.

Legend: T rows (tokens), I columns of this rank, P programs. `BLOCK` is I rounded up to a power of two; `*_stride` is
the distance between rows in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def norm_gate_sum_squares_kernel(
    o_ptr,
    sumsq_ptr,
    rows,
    o_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """sumsq_T = sum over I of o^2."""
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        o = tl.load(o_ptr + row * o_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(sumsq_ptr + row, tl.sum(o * o))


@triton.jit(do_not_specialize=["rows"])
def norm_gate_forward_kernel(
    o_ptr,
    gate_ptr,
    weight_ptr,
    sumsq_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    o_stride,
    gate_stride,
    inv_width,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GIVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write y = sigmoid(gate) * weight * o * rstd, and rstd_T; sumsq_T is read when GIVEN, else summed here."""
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        o = tl.load(o_ptr + row * o_stride + cols, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
        sumsq = tl.load(sumsq_ptr + row) if GIVEN else tl.sum(o * o)
        rstd = tl.rsqrt(sumsq * inv_width + eps)
        y = tl.sigmoid(gate) * weight * (o * rstd)
        tl.store(y_ptr + row * WIDTH + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows"])
def norm_gate_dots_kernel(
    dy_ptr,
    o_ptr,
    gate_ptr,
    weight_ptr,
    dot_ptr,
    rows,
    dy_stride,
    o_stride,
    gate_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """dot_T = sum over I of dy * sigmoid(gate) * weight * o."""
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + row * o_stride + cols, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dot_ptr + row, tl.sum(dy * tl.sigmoid(gate) * weight * o))


@triton.jit(do_not_specialize=["rows"])
def norm_gate_backward_kernel(
    dy_ptr,
    o_ptr,
    gate_ptr,
    weight_ptr,
    rstd_ptr,
    dot_ptr,
    do_ptr,
    dgate_ptr,
    dweight_ptr,
    rows,
    dy_stride,
    o_stride,
    gate_stride,
    inv_width,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GIVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """do, dgate, and this program's row of dweight_PI; dot_T is read when GIVEN, else summed here.

    The order saves registers: what does not need the sum over the row is written before it.
    """
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + row * o_stride + cols, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        # Read for every row, from the L1 cache, the weight takes no registers between. The condition always holds: it
        # keeps the compiler from copying the weight to shared memory with each row.
        weight = tl.zeros([BLOCK], dtype=tl.float32)
        if row < rows:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        unit = o * rstd
        dscaled = dy * sigmoid  # the gradient of weight * unit
        dunit = dscaled * weight
        product = dunit * unit
        dweight += dscaled * unit
        dgate = product * (1.0 - sigmoid)
        tl.store(dgate_ptr + row * WIDTH + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        dot = tl.load(dot_ptr + row) * rstd if GIVEN else tl.sum(product)
        mean = dot * inv_width
        do = (dunit - unit * mean) * rstd
        tl.store(do_ptr + row * WIDTH + cols, do.to(do_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + program * WIDTH + cols, dweight, mask=mask)
