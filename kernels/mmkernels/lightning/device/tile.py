"""Pieces that the Triton kernels of lightning attention share.

All kernels scan a row in "scan order": token order, or from the last token to the first when REVERSE. Only addresses
know the difference, so the mathematics is written once. Position p of the scan is token p, or token T-1-p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.common.triton_support import INTERPRETED

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def one_minus_decay_over(slope, steps):
    """``1 - exp(-slope * steps)`` to fp32 accuracy: a state that loses it by subtraction does not drift.

    Multiplying by a rounded ``exp(-slope * steps)`` errs the same way every time, 3e-8 a chunk, which over a million
    tokens with slope 1e-6 is 5e-4.
    """
    x = slope * steps
    # For small x the difference to 1 cancels: Taylor, whose next term is below 1e-9 of the sum for x < 1/4.
    series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7))))))
    return tl.where(x < 0.25, series, 1 - tl.exp2(-x * LOG2E))


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """Hyperbolic tangent, fp32; in one instruction if an absolute error of 5e-4 will do."""
    if _INTERPRETED:
        return 2 / (1 + tl.exp2(x * (-2 * LOG2E))) - 1
    elif APPROXIMATE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:  # by the approximate instructions for power and reciprocal
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t; mul.f32 t, $1, 0fC038AA3B; ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 t, t; fma.rn.f32 $0, t, 0f40000000, 0fBF800000; }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def silu(x):
    """``x sigmoid(x) = x/2 (1 + tanh(x/2))`` in the type of x. Rounding to bfloat16 errs four times as much as tanh."""
    half = x.to(tl.float32) * 0.5
    return (half + half * tanh(half, x.dtype == tl.bfloat16)).to(x.dtype)


@triton.jit
def silu_derivative(x):
    """Derivative of SiLU at x, fp32: ``g + x g (1 - g)`` with ``g = sigmoid(x) = (1 + tanh(x / 2)) / 2``."""
    half = x.to(tl.float32) * 0.5
    t = tanh(half, x.dtype == tl.bfloat16)
    return (0.5 + 0.5 * t) * (1 + half * (1 - t))


@triton.jit
def scan_pointer(operand, batch, head, T, position, REVERSE: tl.constexpr):
    """Address of a position of the scan, and the stride from one position to the next.

    ``operand`` is (pointer, stride between heads, stride between tokens) of a tensor [B, T, H, width].
    """
    ptr, stride_head, stride_token = operand
    token = tl.cast(batch, tl.int64) * T
    if REVERSE:
        token += T - 1 - position
        return ptr + token * stride_token + tl.cast(head, tl.int64) * stride_head, -stride_token
    else:
        token += position
        return ptr + token * stride_token + tl.cast(head, tl.int64) * stride_head, stride_token


@triton.jit
def load_int64_if(ptr, condition):
    """An int64 where the condition holds, else 0.

    Not ``tl.load``: where later loads depend on one, Triton copies it ahead through shared memory as a stage of its
    own, and so halves the depth of the pipeline that the tiles have. And a load that is not made is not waited for.
    """
    if _INTERPRETED:
        return tl.load(ptr, mask=condition, other=0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b64 $0, 0; @p ld.global.nc.b64 $0, [$1]; }", "=l,l,r",
            [ptr.to(tl.int64), condition.to(tl.int32)], dtype=tl.int64, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def load_tile(ptr, row_ok, col_ok, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """A tile; zeros outside, so that padding adds nothing to any product.

    Whole tiles are read without a mask: those loads are copied to shared memory ahead of their use at full width.
    """
    if MASK_ROWS and MASK_COLS:
        return tl.load(ptr, mask=row_ok[:, None] & col_ok[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptr, mask=row_ok[:, None], other=0.0)
    elif MASK_COLS:
        return tl.load(ptr, mask=col_ok[None, :], other=0.0)
    else:
        return tl.load(ptr)


@triton.jit
def store_tile(ptr, x, row_ok, col_ok, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Store what lies inside."""
    x = x.to(ptr.dtype.element_ty)
    if MASK_ROWS and MASK_COLS:
        tl.store(ptr, x, mask=row_ok[:, None] & col_ok[None, :])
    elif MASK_ROWS:
        tl.store(ptr, x, mask=row_ok[:, None])
    elif MASK_COLS:
        tl.store(ptr, x, mask=col_ok[None, :])
    else:
        tl.store(ptr, x)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``a @ b`` accumulated in fp32."""
    if _INTERPRETED:  # numpy has no bfloat16: the interpreter would multiply the bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc)
    else:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def as_operand(state, like):
    """The fp32 state in the type in which it meets ``like`` in a product: the type of ``like``.

    Not float16, which would overflow at 65,504, as states do over long rows: there both become tf32, which has
    float16's mantissa and fp32's range.
    """
    if like.dtype == tl.float16:
        return state
    else:
        return state.to(like.dtype)


@triton.jit
def dk_or_dv_operands(is_dk, q, k, v, do, dk, dv, k_raw, v_raw):
    """Operands (a, b, c, out, raw) of the reversed scan that writes dk (if ``is_dk``) or dv, of pointers or strides."""
    a, b, c, out, raw = k, q, do, dv, v_raw
    if is_dk:
        a, b, c, out, raw = v, do, q, dk, k_raw
    return a, b, c, out, raw


@triton.jit
def select(condition, a: tl.constexpr, b: tl.constexpr):
    """``a if condition else b``; a constant where both are equal."""
    if a == b:
        return a
    else:
        return tl.where(condition, a, b)
