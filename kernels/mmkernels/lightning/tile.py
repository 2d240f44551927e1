"""Pieces that the Triton kernels of lightning attention share.

All kernels walk a row in "walk order": token order, or from the last token to the first when REVERSE. Only addresses
know the difference, so the mathematics is written once. Position p of the walk is token p, or token T-1-p.

Shape letters: C tokens of a chunk, D and E widths of a state [D, E].
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.triton_support import INTERPRETED

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def loss_over(slope, steps):
    """``1 - exp(-slope * steps)`` to fp32 accuracy: a state that loses it by subtraction does not drift.

    Multiplying by a rounded ``exp(-slope * steps)`` errs the same way every time, 3e-8 a chunk, which over a million
    tokens with slope 1e-6 is 5e-4.
    """
    x = slope * steps
    # For small x the difference to 1 cancels: Taylor, whose next term is below 1e-9 of the sum for x < 1/4.
    series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7))))))
    return tl.where(x < 0.25, series, 1 - tl.exp2(-x * LOG2E))


@triton.jit
def silu_slope(x):
    """Derivative of SiLU at x, fp32."""
    wide = x.to(tl.float32)
    if _INTERPRETED:
        s = 1 / (1 + tl.exp2(-wide * LOG2E))
    else:  # the sigmoid by the approximate instructions for power and reciprocal
        s = tl.inline_asm_elementwise(
            """{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }""",
            "=f,f", [wide], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return s * (1 + wide * (1 - s))


@triton.jit
def walk_base(ptr, batch, head, stride_token, stride_head, tokens, REVERSE: tl.constexpr):
    """Address of position 0 of the walk, and the stride from one position to the next."""
    start = tl.cast(batch, tl.int64) * tokens
    if REVERSE:
        return ptr + (start + tokens - 1) * stride_token + tl.cast(head, tl.int64) * stride_head, -stride_token
    else:
        return ptr + start * stride_token + tl.cast(head, tl.int64) * stride_head, stride_token


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
def document_first(bounds_ptr, position, ok, tokens, HAS_INIT: tl.constexpr, REVERSE: tl.constexpr):
    """Position at which the document of each position began; ``bounds`` is [2, T], starts and ends of documents.

    The document that an entering state belongs to began before the row: position -1.
    """
    if REVERSE:
        first = tokens - tl.load(bounds_ptr + tokens + (tokens - 1 - position), mask=ok, other=0)
    else:
        first = tl.load(bounds_ptr + position, mask=ok, other=0)
    if HAS_INIT:
        first = tl.where(first == 0, -1, first)
    return first


@triton.jit
def chunk_mark(marks_ptr, position, C: tl.constexpr, HAS_INIT: tl.constexpr, VARLEN: tl.constexpr):
    """Bit j: a document starts at position j of the chunk that holds ``position`` (chunks start at multiples of C).

    The first document of the row is not new when the state before the row belongs to it.
    """
    if VARLEN:
        mark = tl.load(marks_ptr + position // C)
        if HAS_INIT:
            mark = tl.where(position < C, mark & -2, mark)
        return mark.to(tl.uint64)
    else:
        return tl.full([], 0, tl.uint64)


@triton.jit
def last_mark_before(mark, i):
    """The highest set bit of ``mark`` at or below each position i; -1 where there is none."""
    below = mark & ((tl.full([], 2, tl.uint64) << i.to(tl.uint64)) - 1)
    if _INTERPRETED:
        bits = ((below[:, None] >> i.to(tl.uint64)[None, :]) & 1) != 0
        return tl.max(tl.where(bits, i[None, :], -1), axis=1)
    else:
        return tl.inline_asm_elementwise("bfind.u64 $0, $1;", "=r,l", [below], dtype=tl.int32, is_pure=True, pack=1)


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
