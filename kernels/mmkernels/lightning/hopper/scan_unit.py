"""The scan of `device/scan.py` for Hopper's tensor cores, in Gluon, where we choose the order of the products.

Triton waits for each product where it stands. Here the products of a chunk overlap with the arithmetic around them: its
scores are under way since the chunk before; ``a S`` and the state's update run while the scores are decayed and the
next chunk goes through SiLU; the next chunk's scores run while the output is stored. Copies to shared memory are asked
for NUM_STAGES - 1 chunks ahead, at the top of a chunk.

For bfloat16 heads of 64 or 128 in chunks of 64. Shape letters, FLA's: T tokens, H heads, BT tokens of a chunk, K width
of a, b and c, BV columns of c that a program holds, state [K, BV].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mmkernels.lightning.device.padded_chunks import document_end_of, pad_of
from mmkernels.lightning.device.scan import add_entering_state, load_state, unit_of_work
from mmkernels.lightning.device.tile import (
    LOG2E,
    one_minus_decay_over,
    scan_pointer,
    silu_derivative,
)
from mmkernels.lightning.hopper.copies import activate_chunk, copy_chunk


@gluon.jit
def load_cursor(n, pad, document_end, hi, chunk_ends, BT: gl.constexpr, PADDED_CHUNKS: gl.constexpr):
    """Padding of the chunk after n, the end of its document, and how many positions further it starts."""
    advance = BT
    if PADDED_CHUNKS:
        ends_document = n + 1 == document_end
        chunk_end = gl.load(chunk_ends + 2 + n, mask=ends_document & (document_end < hi), other=0)
        pad = pad_of(chunk_end)
        advance = BT - pad
        document_end = gl.where(ends_document, document_end_of(chunk_end), document_end)
    else:
        pad = pad * 0
    return pad, document_end, advance


@gluon.jit
def first_document(lo, hi, chunk_ends, PADDED_CHUNKS: gl.constexpr):
    """Index of the chunk at which the document of chunk ``lo`` has ended, and the number of chunks of the row."""
    document_end, num_chunks = hi, hi
    if PADDED_CHUNKS:
        num_chunks = gl.load(chunk_ends).to(gl.int32)
        document_end = document_end_of(gl.load(chunk_ends + 1 + gl.maximum(gl.minimum(lo, num_chunks - 1), 0)))
    return document_end, num_chunks


@gluon.jit
def chunk_decay(
    n, pad, document_end, num_chunks, slope, decay_in, decay_out, one_minus_decay, first_one_minus_decay,
    out_row, decayed_row, SHIFT: gl.constexpr, MASKED: gl.constexpr, PADDED_CHUNKS: gl.constexpr,
    USE_INITIAL_STATE: gl.constexpr,
):  # fmt: skip
    """Weights of chunk n: of the state that enters it at each row, of each row in the state that leaves it, and the
    part of the entering state that it forgets.
    """
    entering, leaving, forgotten = decay_in, decay_out, one_minus_decay
    if MASKED:
        leaving = gl.where(decayed_row >= pad, leaving, 0.0)
    if MASKED and USE_INITIAL_STATE:  # else no state meets padding
        entering = gl.exp2(-slope * LOG2E * gl.maximum(out_row + 1 - SHIFT - pad, 0))
        forgotten = first_one_minus_decay
    if PADDED_CHUNKS:
        forgets = (n + 1 == document_end) & (document_end < num_chunks)  # another document follows
        leaving = gl.where(forgets, 0.0, leaving)
        forgotten = gl.where(forgets, 1.0, forgotten)
    return entering, leaving, forgotten


@gluon.jit
def scan_unit_hopper(
    a_operand, b_operand, c_operand, out_operand, raw_operand, slopes_ptr, cu_seqlens, chunk_starts, chunk_ends,
    segment_firsts, h0, h_segments, ht, state_stride_k, state_stride_v, T, H, segments, chunks_per_segment,
    part, head, unit, stores_final_state,
    K: gl.constexpr, BT: gl.constexpr, BV: gl.constexpr,
    REVERSE: gl.constexpr, MASKED: gl.constexpr, PADDED_CHUNKS: gl.constexpr, IS_VARLEN: gl.constexpr,
    STATE_PER_SEGMENT: gl.constexpr, USE_INITIAL_STATE: gl.constexpr, USE_SEGMENT_STATES: gl.constexpr,
    STORE_FINAL_STATE: gl.constexpr, SILU_GRAD: gl.constexpr, NUM_STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    APPLY_SILU: gl.constexpr = False, DECAY_B: gl.constexpr = False,
):  # fmt: skip
    """``out = scan(a, b, c)`` over one unit of work, as `device.scan.scan_unit`, for BV columns of the state.

    With APPLY_SILU, a, b and c are SiLU of the tensors in memory. Two WARPGROUPS divide the work: each has half of the
    columns of an output, and half of the rows of the state.

    Of each pair that enters the state one side takes the decay, and is rounded once more: c, which is half as large, or
    with DECAY_B b. Over b's columns the next product sums, so that those errors average out where c's do not.
    """
    AB_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4 * WARPGROUPS, 1], [1, 0])
    C_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [4 * WARPGROUPS, 1], [1, 0])
    SCORES_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPGROUPS], [16, BT // WARPGROUPS, 16])
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPGROUPS], [16, BV // WARPGROUPS, 16])
    STATE_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * WARPGROUPS, 1], [16, BV, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, K], gl.bfloat16)
    slim: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BV], gl.bfloat16)
    a_s = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BT, K], wide)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BT, K], wide)
    c_s = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BT, BV], slim)
    weighted_s = gl.allocate_shared_memory(gl.bfloat16, [BT, K if DECAY_B else BV], wide if DECAY_B else slim)
    state_s = gl.allocate_shared_memory(
        gl.bfloat16, [K, BV], gl.NVMMASharedLayout.get_default_for([K, BV], gl.bfloat16)
    )
    if WARPGROUPS == 2:  # a product of one warpgroup takes scores of both
        scores_s = gl.allocate_shared_memory(
            gl.bfloat16, [BT, BT], gl.NVMMASharedLayout.get_default_for([BT, BT], gl.bfloat16)
        )

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
    c, out, raw = c + part * BV, out + part * BV, raw + part * BV
    slope = gl.load(slopes_ptr + head).to(gl.float32)

    row = gl.arange(0, BT, layout=gl.SliceLayout(1, AB_LAYOUT))
    col = gl.arange(0, K, layout=gl.SliceLayout(0, AB_LAYOUT))
    c_row = gl.arange(0, BT, layout=gl.SliceLayout(1, C_LAYOUT))
    c_col = gl.arange(0, BV, layout=gl.SliceLayout(0, C_LAYOUT))
    a_at, b_at = row[:, None] * a_step + col[None, :], row[:, None] * b_step + col[None, :]
    c_at, out_at = c_row[:, None] * c_step + c_col[None, :], c_row[:, None] * out_step + c_col[None, :]
    raw_at = c_row[:, None] * raw_step + c_col[None, :]
    k = gl.arange(0, K, layout=gl.SliceLayout(1, STATE_LAYOUT))
    v = gl.arange(0, BV, layout=gl.SliceLayout(0, STATE_LAYOUT))
    kv = k[:, None] * state_stride_k + (part * BV + v)[None, :] * state_stride_v
    none = gl.zeros([BT, BV], gl.float32, OUT_LAYOUT)
    no_scores = gl.zeros([BT, BT], gl.float32, SCORES_LAYOUT)
    state = gl.zeros([K, BV], gl.float32, STATE_LAYOUT)
    if STATE_PER_SEGMENT:
        state += load_state(h0, state_index, head, H, kv, kv >= 0, K * K)
    else:
        state = add_entering_state(
            state, h0, h_segments, chunk_starts, chunk_ends, state_index, batch, lo, head, H, segments,
            chunks_per_segment, slope, T, kv, kv >= 0, USE_INITIAL_STATE, USE_SEGMENT_STATES, PADDED_CHUNKS, K * K, BT,
        )  # fmt: skip

    SHIFT: gl.constexpr = 1 if REVERSE else 0
    i = gl.arange(0, BT, layout=gl.SliceLayout(1, SCORES_LAYOUT))
    j = gl.arange(0, BT, layout=gl.SliceLayout(0, SCORES_LAYOUT))
    lag = i[:, None] - j[None, :]
    decay = gl.where(lag >= 0, gl.exp2(-slope * LOG2E * lag), 0.0)
    decayed_row = row if DECAY_B else c_row
    decay_out = gl.exp2(-slope * LOG2E * (BT - 1 + SHIFT - decayed_row))
    out_row = gl.arange(0, BT, layout=gl.SliceLayout(1, OUT_LAYOUT))
    decay_in = gl.exp2(-slope * LOG2E * (out_row + 1 - SHIFT))
    one_minus_decay = one_minus_decay_over(slope, BT)
    first_one_minus_decay = one_minus_decay_over(slope, BT - pad)
    document_end, num_chunks = first_document(lo, hi, chunk_ends, PADDED_CHUNKS)
    if MASKED:  # rows that no copy fills meet zeros: they must be numbers
        for s in gl.static_range(NUM_STAGES):
            b_s.index(s).store(gl.zeros([BT, K], gl.bfloat16, AB_LAYOUT))
            c_s.index(s).store(gl.zeros([BT, BV], gl.bfloat16, C_LAYOUT))

    ahead, ahead_pad, ahead_end = lo, pad, document_end
    for s in gl.static_range(NUM_STAGES - 1):
        copy_chunk(
            a_s.index(s), b_s.index(s), c_s.index(s), a + a_at, b + b_at, c + c_at, row, c_row, ahead_pad,
            ahead < hi, MASKED,
        )  # fmt: skip
        ahead_pad, ahead_end, advance = load_cursor(ahead, ahead_pad, ahead_end, hi, chunk_ends, BT, PADDED_CHUNKS)
        ahead = ahead + 1
        a, b, c = a + advance * a_step, b + advance * b_step, c + advance * c_step
    async_copy.wait_group(NUM_STAGES - 2)
    if APPLY_SILU:
        activate_chunk(a_s.index(0), b_s.index(0), c_s.index(0), AB_LAYOUT, C_LAYOUT)
    fence_async_shared()
    scores = warpgroup_mma(a_s.index(0), b_s.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    buffer = 0
    for n in range(lo, hi):
        following = gl.where(buffer == NUM_STAGES - 1, 0, buffer + 1)
        free = gl.where(buffer == 0, NUM_STAGES - 1, buffer - 1)  # of the chunk before: its products are done
        copy_chunk(
            a_s.index(free), b_s.index(free), c_s.index(free), a + a_at, b + b_at, c + c_at, row, c_row, ahead_pad,
            ahead < hi, MASKED,
        )  # fmt: skip
        ahead_pad, ahead_end, advance = load_cursor(ahead, ahead_pad, ahead_end, hi, chunk_ends, BT, PADDED_CHUNKS)
        ahead = ahead + 1
        a, b, c = a + advance * a_step, b + advance * b_step, c + advance * c_step

        if SILU_GRAD:
            raw_tile = gl.load(raw + raw_at, mask=(c_row >= pad)[:, None] if MASKED else None)
        entering, leaving, forgotten = chunk_decay(
            n, pad, document_end, num_chunks, slope, decay_in, decay_out, one_minus_decay, first_one_minus_decay,
            out_row, decayed_row, SHIFT, MASKED, PADDED_CHUNKS, USE_INITIAL_STATE,
        )  # fmt: skip
        decayed = b_s.index(buffer).load(AB_LAYOUT) if DECAY_B else c_s.index(buffer).load(C_LAYOUT)
        weighted_s.store((decayed.to(gl.float32) * leaving[:, None]).to(gl.bfloat16))
        state_s.store(state.to(gl.bfloat16))
        kept = state - forgotten * state
        fence_async_shared()
        o = warpgroup_mma(a_s.index(buffer), state_s, none, use_acc=False, is_async=True)
        if DECAY_B:
            updated = warpgroup_mma(weighted_s.permute((1, 0)), c_s.index(buffer), kept, is_async=True)
        else:
            updated = warpgroup_mma(b_s.index(buffer).permute((1, 0)), weighted_s, kept, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores]) * decay
        if MASKED:
            scores = gl.where(j[None, :] >= pad, scores, 0.0)
        if WARPGROUPS == 2:
            scores_s.store(scores.to(gl.bfloat16))
            operand = scores_s
        else:
            operand = gl.convert_layout(scores.to(gl.bfloat16), gl.DotOperandLayout(0, OUT_LAYOUT, 2))
        if APPLY_SILU or WARPGROUPS == 2:
            async_copy.wait_group(NUM_STAGES - 2)
            if APPLY_SILU:
                activate_chunk(a_s.index(following), b_s.index(following), c_s.index(following), AB_LAYOUT, C_LAYOUT)
            fence_async_shared()
        o = warpgroup_mma_wait(1, deps=[o])
        o = warpgroup_mma(operand, c_s.index(buffer), o * entering[:, None], is_async=True)
        if not (APPLY_SILU or WARPGROUPS == 2):
            async_copy.wait_group(NUM_STAGES - 2)
            fence_async_shared()
        scores = warpgroup_mma(
            a_s.index(following), b_s.index(following).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        if SILU_GRAD:
            derivative = silu_derivative(gl.convert_layout(raw_tile, OUT_LAYOUT))
        o, state = warpgroup_mma_wait(1, deps=[o, updated])
        if SILU_GRAD:
            o *= derivative
        o = gl.convert_layout(o.to(gl.bfloat16), C_LAYOUT)
        if MASKED:
            gl.store(out + out_at, o, mask=(c_row >= pad)[:, None])
            first_one_minus_decay = one_minus_decay
        else:
            gl.store(out + out_at, o)
        pad, document_end, advance = load_cursor(n, pad, document_end, hi, chunk_ends, BT, PADDED_CHUNKS)
        out, raw = out + advance * out_step, raw + advance * raw_step
        buffer = following
    warpgroup_mma_wait(0, deps=[scores])
    if STORE_FINAL_STATE:
        if stores_final_state & is_last:
            gl.store(ht + (gl.cast(state_index, gl.int64) * H + head) * (K * K) + kv, state)
