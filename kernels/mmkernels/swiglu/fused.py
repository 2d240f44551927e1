"""SwiGLU's activation on Triton: one pass forward, one backward, each element read once and written once.

Legend: N rows, F inner width; 2F is gate and up side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MAX_BLOCK = 1024
"""Elements of a row's half that one program takes, a power of two."""
ELEMENTS_PER_THREAD = 8
"""One load of 16 bytes a thread and half in 16-bit dtypes."""


def triton_swiglu(gate_up_N2F: Tensor, rows: Tensor | None) -> Tensor:
    """See `mmkernels.swiglu`, which has checked the arguments."""
    return _SwiGLU.apply(gate_up_N2F, rows)


def triton_swiglu_grad(
    gate_up_N2F: Tensor, dy_NF: Tensor, rows: Tensor | None, with_output: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `mmkernels.swiglu.swiglu_grad`; the output only where it is asked for."""
    gate_up_N2F, dy_NF = gate_up_N2F.contiguous(), dy_NF.contiguous()
    grad_N2F, (count, width) = torch.empty_like(gate_up_N2F), dy_NF.shape
    y_NF = torch.empty_like(dy_NF) if with_output else None
    block = _block(width)
    if dy_NF.numel():
        _backward_kernel[(count * triton.cdiv(width, block),)](
            gate_up_N2F, dy_NF, grad_N2F, y_NF, rows,
            F=width, BLOCK=block, HAS_ROWS=rows is not None, HAS_Y=with_output, num_warps=_warps(block),
        )  # fmt: skip
    return grad_N2F, y_NF


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate_up_N2F: Tensor, rows: Tensor | None) -> Tensor:
        gate_up_N2F = gate_up_N2F.contiguous()
        ctx.save_for_backward(gate_up_N2F, rows)
        count, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
        y_NF = torch.empty(count, width, dtype=gate_up_N2F.dtype, device=gate_up_N2F.device)
        block = _block(width)
        if y_NF.numel():
            _forward_kernel[(count * triton.cdiv(width, block),)](
                gate_up_N2F, y_NF, rows, F=width, BLOCK=block, HAS_ROWS=rows is not None, num_warps=_warps(block)
            )
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NF: Tensor) -> tuple[Tensor, None]:
        gate_up_N2F, rows = ctx.saved_tensors
        return triton_swiglu_grad(gate_up_N2F, dy_NF, rows)[0], None


def _block(width: int) -> int:
    """The largest block that divides the width, unless that were small."""
    divisor = width & -width
    if divisor >= MAX_BLOCK // 4:
        return min(divisor, MAX_BLOCK)
    return max(16, min(MAX_BLOCK, triton.next_power_of_2(width)))


def _warps(block: int) -> int:
    return max(1, block // (32 * ELEMENTS_PER_THREAD))


@triton.jit
def _forward_kernel(
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
def _backward_kernel(
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
