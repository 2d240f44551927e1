"""The walk of one program along its segment: what every pass of lightning attention does, forward and backward.

Shape letters: C tokens of a chunk, D width of a and b, E width of c, state [D, E].
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.lightning.tile import (
    LOG2E,
    as_operand,
    chunk_mark,
    document_first,
    dot,
    dot_add,
    last_mark_before,
    load_tile,
    loss_over,
    silu_slope,
    store_tile,
    walk_base,
)


@triton.jit
def segment_span(z, bounds_ptr, segments, length, tokens, DOCUMENTS: tl.constexpr, REVERSE: tl.constexpr):
    """Batch row, segment index and half-open span of positions of unit z: a segment of a row, or a document."""
    if DOCUMENTS:
        # Offsets are not read on the host: wrong ones must not send a kernel out of its row.
        lo = tl.minimum(tl.maximum(tl.cast(tl.load(bounds_ptr + z), tl.int32), 0), tokens)
        hi = tl.minimum(tl.maximum(tl.cast(tl.load(bounds_ptr + z + 1), tl.int32), lo), tokens)
        if REVERSE:
            return z * 0, z * 0, tokens - hi, tokens - lo
        else:
            return z * 0, z * 0, lo, hi
    else:
        segment = z % segments
        lo = segment * length
        return z // segments, segment, lo, tl.minimum(lo + length, tokens)


@triton.jit
def entering_state(
    init_ptr, local_ptr, bounds_ptr, owner, batch, segment, head, heads, segments, length, slope, tokens, de, de_ok,
    VARLEN: tl.constexpr, HAS_INIT: tl.constexpr, HAS_LOCAL: tl.constexpr, REVERSE: tl.constexpr,
    SIZE: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """State before the first position of a segment: the row's own, and what each earlier segment left behind."""
    state = tl.zeros([BD, BE], tl.float32)
    first = 0
    if VARLEN:
        before = tl.maximum(segment * length - 1, 0)
        first = document_first(bounds_ptr, before, before >= 0, tokens, HAS_INIT, REVERSE)
    if HAS_INIT:
        reaches = (segment == 0) | (first < 0) if VARLEN else segment >= 0
        if reaches:
            at = (tl.cast(owner, tl.int64) * heads + head) * SIZE
            weight = tl.exp2(-slope * LOG2E * (segment * length))
            state += weight * tl.load(init_ptr + at + de, mask=de_ok, other=0.0)
    if HAS_LOCAL:
        for back in range(0, segment):
            earlier = segment - 1 - back
            weight = tl.exp2(-slope * LOG2E * (back * length))
            # Below 2^-30 a state cannot be seen beside that of the nearest segment.
            if (weight > 9.3e-10) & (first < (earlier + 1) * length):
                at = ((tl.cast(batch, tl.int64) * segments + earlier) * heads + head) * SIZE
                state += weight * tl.load(local_ptr + at + de, mask=de_ok, other=0.0)
    return state


@triton.jit
def chunk_step(
    state, a_tile, b_tile, c_tile, out_tile, raw_tile, count, mark, slope, decay, into, outof, lost, i, d_ok, e_ok,
    C: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_D: tl.constexpr, MASK_E: tl.constexpr,
    VARLEN: tl.constexpr, SILU_GRAD: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of ``count`` tokens: its output is stored, the state after it returned. Bit j of ``mark`` says that a
    document starts at its position j.

    The order of the lines keeps the tensor cores busy: both products that wait for nothing come first, and what the
    next ones need is prepared meanwhile.
    """
    ok = i < count
    a = load_tile(a_tile, ok, d_ok, MASK_ROWS, MASK_D)
    b = load_tile(b_tile, ok, d_ok, MASK_ROWS, MASK_D)
    c = load_tile(c_tile, ok, e_ok, MASK_ROWS, MASK_E)
    if SILU_GRAD:
        raw = load_tile(raw_tile, ok, e_ok, MASK_ROWS, MASK_E)
    if MASK_ROWS:
        outof = tl.where(ok, tl.exp2(-slope * LOG2E * (count - 1 + SHIFT - i)), 0.0)
        lost = loss_over(slope, count)
    seen = into
    if VARLEN:
        # All masks come from one word and from indices: tensors read from memory would change layout on the way.
        outof = tl.where((mark >> 1 >> i.to(tl.uint64)) == 0, outof, 0.0)
        lost = tl.where(mark == 0, lost, 1.0)
    scores = dot(a, tl.trans(b), PRECISION)
    weighted = (c.to(tl.float32) * outof[:, None]).to(c.dtype)
    entered = as_operand(state, a)
    o = dot(a.to(entered.dtype), entered, PRECISION)
    scores = scores * decay
    if VARLEN:
        if mark != 0:
            first = last_mark_before(mark, i)
            scores = tl.where(i[None, :] >= first[:, None], scores, 0.0)
            seen = tl.where(first < 0, into, 0.0)
    o = dot_add(scores.to(c.dtype), c, o * seen[:, None], PRECISION)
    state = dot_add(tl.trans(b), weighted, state - lost * state, PRECISION)
    if SILU_GRAD:
        o *= silu_slope(raw)
    store_tile(out_tile, o, ok, e_ok, MASK_ROWS, MASK_E)
    return state


@triton.jit
def walk_segment(
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, marks_ptr, init_ptr, local_ptr, leave_ptr,
    a_token, a_head, b_token, b_head, c_token, c_head, out_token, out_head, raw_token, raw_head, state_d, state_e,
    tokens, heads, segments, length, part, head, z, leaves,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_INIT: tl.constexpr,
    HAS_LOCAL: tl.constexpr, LEAVE: tl.constexpr, SILU_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = scan(a, b, c)`` over one segment, for BE columns of the state, which stays in registers throughout."""
    batch, segment, lo, hi = segment_span(z, bounds_ptr, segments, length, tokens, DOCUMENTS, REVERSE)
    owner = z if DOCUMENTS else batch
    a, a_step = walk_base(a_ptr, batch, head, a_token, a_head, tokens, REVERSE)
    b, b_step = walk_base(b_ptr, batch, head, b_token, b_head, tokens, REVERSE)
    c, c_step = walk_base(c_ptr, batch, head, c_token, c_head, tokens, REVERSE)
    out, out_step = walk_base(out_ptr, batch, head, out_token, out_head, tokens, REVERSE)
    raw, raw_step = walk_base(raw_ptr, batch, head, raw_token, raw_head, tokens, REVERSE)
    slope = tl.load(slopes_ptr + head).to(tl.float32)
    i, d, e = tl.arange(0, C), tl.arange(0, BD), part * BE + tl.arange(0, BE)
    d_ok, e_ok = d < D, e < E
    de, de_ok = d[:, None] * state_d + e[None, :] * state_e, d_ok[:, None] & e_ok[None, :]
    state = entering_state(
        init_ptr, local_ptr, bounds_ptr, owner, batch, segment, head, heads, segments, length, slope, tokens, de, de_ok,
        VARLEN, HAS_INIT, HAS_LOCAL, REVERSE, D * E, BD, BE,
    )  # fmt: skip
    # A reversed walk counts one step more when a token enters its state and one less when the state is read: then the
    # state before the walk is the gradient of the final state, and the one after it that of the initial state.
    SHIFT: tl.constexpr = 1 if REVERSE else 0
    lag = i[:, None] - i[None, :]
    decay = tl.where(lag >= 0, tl.exp2(-slope * LOG2E * lag), 0.0)
    into = tl.exp2(-slope * LOG2E * (i + 1 - SHIFT))
    outof = tl.exp2(-slope * LOG2E * (C - 1 + SHIFT - i))
    lost = loss_over(slope, C)
    a_tile, b_tile = a + (i[:, None] * a_step + d[None, :]), b + (i[:, None] * b_step + d[None, :])
    c_tile, raw_tile = c + (i[:, None] * c_step + e[None, :]), raw + (i[:, None] * raw_step + e[None, :])
    out_tile = out + (i[:, None] * out_step + e[None, :])
    at = tl.cast(lo, tl.int64)
    a_p, b_p, c_p = a_tile + at * a_step, b_tile + at * b_step, c_tile + at * c_step
    out_p, raw_p = out_tile + at * out_step, raw_tile + at * raw_step
    mark = chunk_mark(marks_ptr, lo, C, HAS_INIT, VARLEN)
    for p in tl.range(lo, lo + (hi - lo) // C * C, C):
        # Read a chunk ahead: nothing hides the time of this load.
        following = chunk_mark(marks_ptr, tl.minimum(p + C, hi - 1), C, HAS_INIT, VARLEN)
        state = chunk_step(
            state, a_p, b_p, c_p, out_p, raw_p, C, mark, slope, decay, into, outof, lost, i, d_ok, e_ok,
            C, False, BD != D, E % BE != 0, VARLEN, SILU_GRAD, SHIFT, PRECISION,
        )  # fmt: skip
        mark = following
        a_p += C * a_step
        b_p += C * b_step
        c_p += C * c_step
        out_p += C * out_step
        if SILU_GRAD:
            raw_p += C * raw_step
    rest = (hi - lo) % C
    if rest > 0:
        at = tl.cast(hi - rest, tl.int64)
        state = chunk_step(
            state, a_tile + at * a_step, b_tile + at * b_step, c_tile + at * c_step, out_tile + at * out_step,
            raw_tile + at * raw_step, rest, mark, slope, decay, into, outof, lost, i, d_ok, e_ok,
            C, True, BD != D, E % BE != 0, VARLEN, SILU_GRAD, SHIFT, PRECISION,
        )  # fmt: skip
    if LEAVE:
        if leaves & (DOCUMENTS | (segment == segments - 1)):
            tl.store(leave_ptr + (tl.cast(owner, tl.int64) * heads + head) * (D * E) + de, state, mask=de_ok)
