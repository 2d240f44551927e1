"""Triton kernels of SwiGLU's activation: one pass forward, one backward, each element read once and written once.

Legend: N rows, F inner width; 2F is gate and up side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_forward_kernel(
    gate_up_ptr,
    y_ptr,
    rows_ptr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
) -> None:
    """Forward: y = SiLU(gate) * up. Grid: N * ceil(F / BLOCK)."""
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    f = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    read = f < F
    if HAS_ROWS:
        # Broadcast, then compare: the interpreter broadcasts a scalar comparison to int32, which is no mask.
        read &= tl.broadcast_to(n, [BLOCK]) < tl.load(rows_ptr)
    gate = tl.load(gate_up_ptr + n * (2 * F) + f, mask=read, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + n * (2 * F) + F + f, mask=read, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + n * F + f, y.to(y_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr,
    dy_ptr,
    grad_ptr,
    y_ptr,
    rows_ptr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_Y: tl.constexpr,
) -> None:
    """Backward: dgate = dy * up * s (1 + gate (1 - s)), dup = dy * gate * s, with s = sigmoid(gate). Grid as above.

    Writes y once more if HAS_Y.
    """
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    f = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    read = f < F
    if HAS_ROWS:
        read &= tl.broadcast_to(n, [BLOCK]) < tl.load(rows_ptr)
    at_gate = n * (2 * F) + f
    gate = tl.load(gate_up_ptr + at_gate, mask=read, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at_gate + F, mask=read, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + n * F + f, mask=read, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_ptr + at_gate, dgate.to(grad_ptr.dtype.element_ty), mask=f < F)
    tl.store(grad_ptr + at_gate + F, (dy * gate * sigmoid).to(grad_ptr.dtype.element_ty), mask=f < F)
    if HAS_Y:
        tl.store(y_ptr + n * F + f, (gate * sigmoid * up).to(y_ptr.dtype.element_ty), mask=f < F)
