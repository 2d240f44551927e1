"""The walk of one program along its part of a row: what every pass of lightning attention does, forward and backward.

Chunks end where their document ends, so that only the first one of a document may be padded, on its left (`slots.py`).

Shape letters: C tokens of a chunk, D width of a and b, E width of c, state [D, E].
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.lightning.device.padded_chunks import (
    document_spans,
    slot_opened,
    slot_pad,
    slot_share,
    slot_start,
    slot_until,
)
from mmkernels.lightning.device.tile import (
    LOG2E,
    as_operand,
    dot,
    dot_add,
    load_tile,
    load_word_if,
    loss_over,
    silu_slope,
    store_tile,
    walk_base,
)


@triton.jit
def unit_of_work(
    z, bounds_ptr, words_ptr, segments, share, tokens,
    C: tl.constexpr, REVERSE: tl.constexpr, SLOTS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Unit z: batch row, half-open range of chunks, position at which the first one starts, its padding, and whether
    the unit ends its row (or is a document).
    """
    batch, segment = z // segments, z % segments
    if DOCUMENTS:
        begin, end = document_spans(bounds_ptr, z, segments, tokens)
        first = tokens - end if REVERSE else begin
        chunks = (end - begin + C - 1) // C
        pad = chunks * C - (end - begin)
        return batch * 0, z * 0, chunks, first - pad, pad, z >= 0
    elif SLOTS:
        count, share = slot_share(words_ptr, segments)
        lo = segment * share
        hi = tl.minimum(lo + share, count)
        at = tl.maximum(tl.minimum(lo, count - 1), 0)
        start, pad = slot_start(tl.load(bounds_ptr + at)), slot_pad(tl.load(words_ptr + 1 + at))
        return batch, lo, hi, start, pad, (lo < hi) & (hi == count)
    else:
        chunks = (tokens + C - 1) // C
        pad = chunks * C - tokens
        lo = segment * share
        hi = tl.minimum(lo + share, chunks)
        return batch, lo, hi, lo * C - pad, tl.where(segment == 0, pad, 0), hi == chunks


@triton.jit
def add_entering_state(
    state, init_ptr, local_ptr, bounds_ptr, words_ptr, owner, batch, lo, head, heads, segments, share, slope, tokens,
    de, de_ok, HAS_INIT: tl.constexpr, HAS_LOCAL: tl.constexpr, SLOTS: tl.constexpr,
    SIZE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """``state`` and the one before chunk ``lo`` of a row: the row's own, and what each earlier segment left behind."""
    first, pad = 0, (C - tokens % C) % C
    if SLOTS:
        count, share = slot_share(words_ptr, segments)
        first = slot_opened(tl.load(bounds_ptr + tl.maximum(tl.minimum(lo, count - 1), 0)))
        pad = slot_pad(tl.load(words_ptr + 1))
        if HAS_INIT:  # the document that the state belongs to began before the row
            first = tl.where(first == 0, -1, first)
    if HAS_INIT:
        reaches = (lo == 0) | (first < 0) if SLOTS else lo >= 0
        if reaches:
            at = (tl.cast(owner, tl.int64) * heads + head) * SIZE
            weight = tl.exp2(-slope * LOG2E * tl.maximum(lo * C - pad, 0))
            state += weight * tl.load(init_ptr + at + de, mask=de_ok, other=0.0)
    if HAS_LOCAL:
        segment = lo // tl.maximum(share, 1)
        for back in range(0, segment):
            earlier = segment - 1 - back
            weight = tl.exp2(-slope * LOG2E * (back * share * C))
            # Below 2^-30 a state cannot be seen beside that of the nearest segment.
            if (weight > 9.3e-10) & (first < (earlier + 1) * share):
                at = ((tl.cast(batch, tl.int64) * segments + earlier) * heads + head) * SIZE
                state += weight * tl.load(local_ptr + at + de, mask=de_ok, other=0.0)
    return state


@triton.jit
def chunk_step(
    state, a_tile, b_tile, c_tile, out_tile, raw_tile, ok, store_ok, seen, decay, outof, lost, d_ok, e_ok,
    MASKED: tl.constexpr, MASK_D: tl.constexpr, MASK_E: tl.constexpr, SILU_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk: its output is stored, the state after it returned.

    The order of the lines keeps the tensor cores busy: both products that wait for nothing come first, and what the
    next ones need is prepared meanwhile.
    """
    a = load_tile(a_tile, ok, d_ok, MASKED, MASK_D)
    b = load_tile(b_tile, ok, d_ok, MASKED, MASK_D)
    c = load_tile(c_tile, ok, e_ok, MASKED, MASK_E)
    scores = dot(a, tl.trans(b), PRECISION)
    weighted = (c.to(tl.float32) * outof[:, None]).to(c.dtype)
    entered = as_operand(state, a)
    o = dot(a.to(entered.dtype), entered, PRECISION)
    scores = scores * decay
    o = dot_add(scores.to(c.dtype), c, o * seen[:, None], PRECISION)
    state = dot_add(tl.trans(b), weighted, state - lost * state, PRECISION)
    if SILU_GRAD:
        o *= silu_slope(load_tile(raw_tile, ok, e_ok, MASKED, MASK_E))
    store_tile(out_tile, o, store_ok, e_ok, MASKED, MASK_E)
    return state


@triton.jit
def walk_unit(
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, words_ptr, init_ptr, local_ptr, leave_ptr,
    a_head, b_head, c_head, out_head, raw_head, state_d, state_e, tokens, heads, segments, share, part, head, z,
    leaves, a_token, b_token, c_token, out_token, raw_token,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, SLOTS: tl.constexpr, DOCUMENTS: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_LOCAL: tl.constexpr, LEAVE: tl.constexpr, SILU_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out = scan(a, b, c)`` over one unit of work, for BE columns of the state, which stays in registers."""
    batch, lo, hi, start, pad, ends = unit_of_work(
        z, bounds_ptr, words_ptr, segments, share, tokens, C, REVERSE, SLOTS, DOCUMENTS
    )
    owner = z if DOCUMENTS else batch
    a, a_step = walk_base(a_ptr, batch, head, a_token, a_head, tokens, start, REVERSE)
    b, b_step = walk_base(b_ptr, batch, head, b_token, b_head, tokens, start, REVERSE)
    c, c_step = walk_base(c_ptr, batch, head, c_token, c_head, tokens, start, REVERSE)
    out, out_step = walk_base(out_ptr, batch, head, out_token, out_head, tokens, start, REVERSE)
    raw, raw_step = walk_base(raw_ptr, batch, head, raw_token, raw_head, tokens, start, REVERSE)
    slope = tl.load(slopes_ptr + head).to(tl.float32)
    i, d, e = tl.arange(0, C), tl.arange(0, BD), part * BE + tl.arange(0, BE)
    d_ok, e_ok = d < D, e < E
    de, de_ok = d[:, None] * state_d + e[None, :] * state_e, d_ok[:, None] & e_ok[None, :]
    state = add_entering_state(
        tl.zeros([BD, BE], tl.float32), init_ptr, local_ptr, bounds_ptr, words_ptr, owner, batch, lo, head, heads,
        segments, share, slope, tokens, de, de_ok, HAS_INIT, HAS_LOCAL, SLOTS, D * E, C,
    )  # fmt: skip
    # A reversed walk counts one step more when a token enters its state and one less when the state is read: then the
    # state before the walk is the gradient of the final state, and the one after it that of the initial state.
    SHIFT: tl.constexpr = 1 if REVERSE else 0
    lag = i[:, None] - i[None, :]
    decay = tl.where(lag >= 0, tl.exp2(-slope * LOG2E * lag), 0.0)
    outof = tl.exp2(-slope * LOG2E * (C - 1 + SHIFT - i))
    into = tl.exp2(-slope * LOG2E * (i + 1 - SHIFT))
    lost = loss_over(slope, C)
    loses = loss_over(slope, C - pad)
    a_at, b_at, c_at = (
        i[:, None] * a_step + d[None, :],
        i[:, None] * b_step + d[None, :],
        i[:, None] * c_step + e[None, :],
    )
    out_at, raw_at = i[:, None] * out_step + e[None, :], i[:, None] * raw_step + e[None, :]
    advance = C
    if SLOTS:
        count = tl.load(words_ptr).to(tl.int32)
        until = slot_until(tl.load(words_ptr + 1 + tl.maximum(tl.minimum(lo, count - 1), 0)))
    for n in tl.range(lo, hi, num_stages=STAGES):
        seen, leaving, loss = into, outof, lost
        last_pad = pad - 1  # a mask of its own: Triton would hand the loads' mask on through the stages of the pipeline
        if MASKED and HAS_INIT:  # else no state meets padding
            seen = tl.exp2(-slope * LOG2E * tl.maximum(i + 1 - SHIFT - pad, 0))
            loss = loses
        if SLOTS:
            forgets = (n + 1 == until) & (until < count)  # another document follows
            leaving = tl.where(forgets, 0.0, outof)
            loss = tl.where(forgets, 1.0, loss)
        state = chunk_step(
            state, a + a_at, b + b_at, c + c_at, out + out_at, raw + raw_at, i >= pad, i > last_pad,
            seen, decay, leaving, loss, d_ok, e_ok, MASKED, BD != D, E % BE != 0, SILU_GRAD, PRECISION,
        )  # fmt: skip
        if MASKED:
            pad, loses = 0, lost
        if SLOTS:
            closes = n + 1 == until
            word = load_word_if(words_ptr + 2 + n, closes & (until < hi))
            pad = slot_pad(word)
            advance = C - pad
            until = tl.where(closes, slot_until(word), until)
        a += advance * a_step
        b += advance * b_step
        c += advance * c_step
        out += advance * out_step
        if SILU_GRAD:
            raw += advance * raw_step
    if LEAVE:
        if leaves & ends:
            tl.store(leave_ptr + (tl.cast(owner, tl.int64) * heads + head) * (D * E) + de, state, mask=de_ok)
