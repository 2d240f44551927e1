"""The scan of one program along its part of a row: every pass of lightning attention is one, forward and backward.

Chunks end where their document ends, so that only the first one of a document may be padded, on its left
(`padded_chunks.py`). An operand is a tuple (pointer, stride between heads, stride between tokens).

Shape letters, FLA's: T tokens, H heads, BT tokens of a chunk, K width of a and b, V width of c, BK and BV columns of a
and c in a tile, state [K, V].
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.lightning.device.padded_chunks import (
    count_padded_chunks,
    document_begin_of,
    document_bounds,
    document_end_of,
    pad_of,
    segment_range,
    start_of,
)
from mmkernels.lightning.device.tile import (
    LOG2E,
    as_operand,
    dot,
    dot_add,
    load_int64_if,
    load_tile,
    one_minus_decay_over,
    scan_pointer,
    silu_derivative,
    store_tile,
)


@triton.jit
def unit_of_work(
    unit, cu_seqlens, chunk_starts, chunk_ends, segment_firsts, segments, chunks_per_segment, T,
    BT: tl.constexpr, REVERSE: tl.constexpr, PADDED_CHUNKS: tl.constexpr, IS_VARLEN: tl.constexpr,
    STATE_PER_SEGMENT: tl.constexpr,
):  # fmt: skip
    """Batch row of a unit, its half-open range of chunks, position at which the first one starts, padding of that one,
    and whether the unit ends its row (or is a document).
    """
    batch, segment = unit // segments, unit % segments
    if IS_VARLEN:
        begin, end = document_bounds(cu_seqlens, unit, segments, T)
        first = T - end if REVERSE else begin
        chunks = (end - begin + BT - 1) // BT
        pad = chunks * BT - (end - begin)
        return batch * 0, unit * 0, chunks, first - pad, pad, unit >= 0
    elif PADDED_CHUNKS:
        if STATE_PER_SEGMENT:
            lo, hi, num_chunks = segment_range(chunk_ends, segment_firsts, segment, REVERSE)
        else:
            num_chunks, chunks_per_segment = count_padded_chunks(chunk_ends, segments)
            lo = segment * chunks_per_segment
            hi = tl.minimum(lo + chunks_per_segment, num_chunks)
        at = tl.maximum(tl.minimum(lo, num_chunks - 1), 0)
        start, pad = start_of(tl.load(chunk_starts + at)), pad_of(tl.load(chunk_ends + 1 + at))
        return batch, lo, hi, start, pad, (lo < hi) & (hi == num_chunks)
    else:
        chunks = (T + BT - 1) // BT
        pad = chunks * BT - T
        lo = segment * chunks_per_segment
        hi = tl.minimum(lo + chunks_per_segment, chunks)
        return batch, lo, hi, lo * BT - pad, tl.where(segment == 0, pad, 0), hi == chunks


@triton.jit
def load_state(h0, state_index, head, H, kv, kv_ok, SIZE: tl.constexpr):
    """State ``state_index`` of a head; ``kv`` are places in a state of SIZE numbers."""
    return tl.load(h0 + (tl.cast(state_index, tl.int64) * H + head) * SIZE + kv, mask=kv_ok, other=0.0)


@triton.jit
def add_entering_state(
    state, h0, h_segments, chunk_starts, chunk_ends, state_index, batch, lo, head, H, segments, chunks_per_segment,
    slope, T, kv, kv_ok, USE_INITIAL_STATE: tl.constexpr, USE_SEGMENT_STATES: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``state`` plus the state that enters chunk ``lo`` of a row: the initial one, and what each earlier segment left.

    The host gives initial states as ``h0`` and the segments' states as ``h_segments``; each is decayed up to here.
    """
    first, pad = 0, (BT - T % BT) % BT
    if PADDED_CHUNKS:
        num_chunks, chunks_per_segment = count_padded_chunks(chunk_ends, segments)
        first = document_begin_of(tl.load(chunk_starts + tl.maximum(tl.minimum(lo, num_chunks - 1), 0)))
        pad = pad_of(tl.load(chunk_ends + 1))
        if USE_INITIAL_STATE:  # the document that the state belongs to began before the row
            first = tl.where(first == 0, -1, first)
    if USE_INITIAL_STATE:
        reaches = (lo == 0) | (first < 0) if PADDED_CHUNKS else lo >= 0
        if reaches:
            weight = tl.exp2(-slope * LOG2E * tl.maximum(lo * BT - pad, 0))
            state += weight * load_state(h0, state_index, head, H, kv, kv_ok, SIZE)
    if USE_SEGMENT_STATES:
        segment = lo // tl.maximum(chunks_per_segment, 1)
        for back in range(0, segment):
            earlier = segment - 1 - back
            weight = tl.exp2(-slope * LOG2E * (back * chunks_per_segment * BT))
            # Below 2^-30 a state cannot be seen beside that of the nearest segment.
            if (weight > 9.3e-10) & (first < (earlier + 1) * chunks_per_segment):
                at = ((tl.cast(batch, tl.int64) * segments + earlier) * H + head) * SIZE
                state += weight * tl.load(h_segments + at + kv, mask=kv_ok, other=0.0)
    return state


@triton.jit
def chunk_step(
    state, a_tile, b_tile, c_tile, out_tile, raw_tile, ok, store_ok, entering, decay, leaving, forgotten, k_ok, v_ok,
    MASKED: tl.constexpr, MASK_K: tl.constexpr, MASK_V: tl.constexpr, SILU_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk: its output is stored, the state after it returned.

    The order of the lines keeps the tensor cores busy: both products that wait for nothing come first, and what the
    next ones need is prepared meanwhile.
    """
    a = load_tile(a_tile, ok, k_ok, MASKED, MASK_K)
    b = load_tile(b_tile, ok, k_ok, MASKED, MASK_K)
    c = load_tile(c_tile, ok, v_ok, MASKED, MASK_V)
    scores = dot(a, tl.trans(b), PRECISION)
    weighted = (c.to(tl.float32) * leaving[:, None]).to(c.dtype)
    entered = as_operand(state, a)
    o = dot(a.to(entered.dtype), entered, PRECISION)
    scores = scores * decay
    o = dot_add(scores.to(c.dtype), c, o * entering[:, None], PRECISION)
    state = dot_add(tl.trans(b), weighted, state - forgotten * state, PRECISION)
    if SILU_GRAD:
        o *= silu_derivative(load_tile(raw_tile, ok, v_ok, MASKED, MASK_V))
    store_tile(out_tile, o, store_ok, v_ok, MASKED, MASK_V)
    return state


@triton.jit
def scan_unit(
    a_operand, b_operand, c_operand, out_operand, raw_operand, slopes_ptr, cu_seqlens, chunk_starts, chunk_ends,
    segment_firsts, h0, h_segments, ht, state_stride_k, state_stride_v, T, H, segments, chunks_per_segment,
    part, head, unit, stores_final_state,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, PADDED_CHUNKS: tl.constexpr, IS_VARLEN: tl.constexpr,
    STATE_PER_SEGMENT: tl.constexpr, USE_INITIAL_STATE: tl.constexpr, USE_SEGMENT_STATES: tl.constexpr,
    STORE_FINAL_STATE: tl.constexpr, SILU_GRAD: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """``out = scan(a, b, c)`` over one unit of work, for BV columns of the state, which stays in registers."""
    batch, lo, hi, start, pad, is_last = unit_of_work(
        unit, cu_seqlens, chunk_starts, chunk_ends, segment_firsts, segments, chunks_per_segment, T, BT, REVERSE,
        PADDED_CHUNKS, IS_VARLEN, STATE_PER_SEGMENT,
    )  # fmt: skip
    state_index = unit if IS_VARLEN or STATE_PER_SEGMENT else batch
    a, a_step = scan_pointer(a_operand, batch, head, T, start, REVERSE)
    b, b_step = scan_pointer(b_operand, batch, head, T, start, REVERSE)
    c, c_step = scan_pointer(c_operand, batch, head, T, start, REVERSE)
    out, out_step = scan_pointer(out_operand, batch, head, T, start, REVERSE)
    raw, raw_step = scan_pointer(raw_operand, batch, head, T, start, REVERSE)
    slope = tl.load(slopes_ptr + head).to(tl.float32)
    i, k, v = tl.arange(0, BT), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    k_ok, v_ok = k < K, v < V
    kv, kv_ok = k[:, None] * state_stride_k + v[None, :] * state_stride_v, k_ok[:, None] & v_ok[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if STATE_PER_SEGMENT:
        state += load_state(h0, state_index, head, H, kv, kv_ok, K * V)
    else:
        state = add_entering_state(
            state, h0, h_segments, chunk_starts, chunk_ends, state_index, batch, lo, head, H, segments,
            chunks_per_segment, slope, T, kv, kv_ok, USE_INITIAL_STATE, USE_SEGMENT_STATES, PADDED_CHUNKS, K * V, BT,
        )  # fmt: skip
    # A reversed scan counts one step more when a token enters its state and one less when the state is read: then the
    # state before the scan is the gradient of the final state, and the one after it that of the initial state.
    SHIFT: tl.constexpr = 1 if REVERSE else 0
    lag = i[:, None] - i[None, :]
    decay = tl.where(lag >= 0, tl.exp2(-slope * LOG2E * lag), 0.0)
    decay_out = tl.exp2(-slope * LOG2E * (BT - 1 + SHIFT - i))
    decay_in = tl.exp2(-slope * LOG2E * (i + 1 - SHIFT))
    one_minus_decay = one_minus_decay_over(slope, BT)
    first_one_minus_decay = one_minus_decay_over(slope, BT - pad)
    a_at, b_at, c_at = (
        i[:, None] * a_step + k[None, :],
        i[:, None] * b_step + k[None, :],
        i[:, None] * c_step + v[None, :],
    )
    out_at, raw_at = i[:, None] * out_step + v[None, :], i[:, None] * raw_step + v[None, :]
    advance = BT
    if PADDED_CHUNKS:
        num_chunks = tl.load(chunk_ends).to(tl.int32)
        document_end = document_end_of(tl.load(chunk_ends + 1 + tl.maximum(tl.minimum(lo, num_chunks - 1), 0)))
    for n in tl.range(lo, hi, num_stages=NUM_STAGES):
        entering, leaving, forgotten = decay_in, decay_out, one_minus_decay
        last_pad = pad - 1  # a mask of its own: Triton would hand the loads' mask on through the stages of the pipeline
        if MASKED and USE_INITIAL_STATE:  # else no state meets padding
            entering = tl.exp2(-slope * LOG2E * tl.maximum(i + 1 - SHIFT - pad, 0))
            forgotten = first_one_minus_decay
        if PADDED_CHUNKS:
            forgets = (n + 1 == document_end) & (document_end < num_chunks)  # another document follows
            leaving = tl.where(forgets, 0.0, decay_out)
            forgotten = tl.where(forgets, 1.0, forgotten)
        state = chunk_step(
            state, a + a_at, b + b_at, c + c_at, out + out_at, raw + raw_at, i >= pad, i > last_pad,
            entering, decay, leaving, forgotten, k_ok, v_ok, MASKED, BK != K, V % BV != 0, SILU_GRAD, PRECISION,
        )  # fmt: skip
        if MASKED:
            pad, first_one_minus_decay = 0, one_minus_decay
        if PADDED_CHUNKS:
            ends = n + 1 == document_end
            chunk_end = load_int64_if(chunk_ends + 2 + n, ends & (document_end < hi))
            pad = pad_of(chunk_end)
            advance = BT - pad
            document_end = tl.where(ends, document_end_of(chunk_end), document_end)
        a += advance * a_step
        b += advance * b_step
        c += advance * c_step
        out += advance * out_step
        if SILU_GRAD:
            raw += advance * raw_step
    if STORE_FINAL_STATE:
        if stores_final_state & is_last:
            tl.store(ht + (tl.cast(state_index, tl.int64) * H + head) * (K * V) + kv, state, mask=kv_ok)
