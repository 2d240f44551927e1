"""States of segments for Hopper, in Gluon: what `triton/states.py` does, with SiLU in shared memory under a product.

For bfloat16 heads of 64 or 128. Shape letters, FLA's: T tokens, H heads, BT tokens of a chunk, K width of b and c, BV
columns of c that a program holds.
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

from mmkernels.lightning.device.span import segment_span
from mmkernels.lightning.device.tile import LOG2E, one_minus_decay_over, scan_pointer, silu
from mmkernels.lightning.hopper.copies import activate, copy_rows


@gluon.jit
def states_hopper_kernel(
    b_ptr, c_ptr, slopes_ptr, cu_seqlens, chunk_starts, chunk_ends, h_segments, b_head, c_head,
    T, H, segments, computed_segments, length, pad, documents,
    b_token: gl.constexpr, c_token: gl.constexpr, K: gl.constexpr, BT: gl.constexpr, BV: gl.constexpr,
    REVERSE: gl.constexpr, PADDED_CHUNKS: gl.constexpr, IS_VARLEN: gl.constexpr, APPLY_SILU: gl.constexpr,
    NUM_STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """States of segments, as `triton.states.states_kernel` computes them.

    Segments are equal numbers of PADDED_CHUNKS, or ``length`` positions of a row; then IS_VARLEN says that the row has
    documents, at ``cu_seqlens``. With APPLY_SILU, b and c are SiLU of the tensors in memory.

    One side of each pair takes the decay, and is rounded once more: the side that the scan weighs, which goes on from
    the states. That is b of a reversed scan, else c.
    """
    B_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    C_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [4, 1], [1, 0])
    STATE_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, K], gl.bfloat16)
    slim: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BV], gl.bfloat16)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BT, K], wide)
    c_s = gl.allocate_shared_memory(gl.bfloat16, [NUM_STAGES, BT, BV], slim)
    weighted_s = gl.allocate_shared_memory(gl.bfloat16, [BT, K if REVERSE else BV], wide if REVERSE else slim)

    pid = gl.program_id(0)
    PARTS: gl.constexpr = K // BV
    part, head, unit = pid % PARTS, pid // PARTS % H, pid // (PARTS * H)
    batch, segment = unit // computed_segments, unit % computed_segments
    slope = gl.load(slopes_ptr + head).to(gl.float32)
    first, end, chunks = segment_span(
        cu_seqlens, chunk_starts, chunk_ends, segment, segments, length, pad, documents, slope, T,
        gl.arange(0, 1024, layout=gl.BlockedLayout([8], [32], [4], [0])), BT, REVERSE, PADDED_CHUNKS, IS_VARLEN, 1024,
    )  # fmt: skip
    SHIFT: gl.constexpr = 1 if REVERSE else 0
    begin = end - chunks * BT  # chunks end where the segment ends; the first one may begin before ``first``
    b, b_step = scan_pointer((b_ptr, b_head, b_token), batch, head, T, begin, REVERSE)
    c, c_step = scan_pointer((c_ptr, c_head, c_token), batch, head, T, begin, REVERSE)
    c += part * BV
    row = gl.arange(0, BT, layout=gl.SliceLayout(1, B_LAYOUT))
    col = gl.arange(0, K, layout=gl.SliceLayout(0, B_LAYOUT))
    c_row = gl.arange(0, BT, layout=gl.SliceLayout(1, C_LAYOUT))
    c_col = gl.arange(0, BV, layout=gl.SliceLayout(0, C_LAYOUT))
    b_at, c_at = row[:, None] * b_step + col[None, :], c_row[:, None] * c_step + c_col[None, :]
    decayed_row = row if REVERSE else c_row
    decay_out = gl.exp2(-slope * LOG2E * (BT - 1 + SHIFT - decayed_row))
    one_minus_decay = one_minus_decay_over(slope, BT)
    state = gl.zeros([K, BV], gl.float32, STATE_LAYOUT)
    # Rows that no copy fills meet zeros: they must be numbers.
    b_s.index(0).store(gl.zeros([BT, K], gl.bfloat16, B_LAYOUT))
    c_s.index(0).store(gl.zeros([BT, BV], gl.bfloat16, C_LAYOUT))
    before = first - begin
    for s in gl.static_range(NUM_STAGES - 1):
        copy_rows(b_s.index(s), b + b_at, row, before, s < chunks, s == 0)
        copy_rows(c_s.index(s), c + c_at, c_row, before, s < chunks, s == 0)
        async_copy.commit_group()
        b, c = b + BT * b_step, c + BT * c_step
    async_copy.wait_group(NUM_STAGES - 2)
    if APPLY_SILU:
        activate(b_s.index(0), B_LAYOUT)
    buffer = 0
    for n in range(0, chunks):
        following = gl.where(buffer == NUM_STAGES - 1, 0, buffer + 1)
        free = gl.where(buffer == 0, NUM_STAGES - 1, buffer - 1)
        copy_rows(b_s.index(free), b + b_at, row, 0, n + NUM_STAGES - 1 < chunks, False)
        copy_rows(c_s.index(free), c + c_at, c_row, 0, n + NUM_STAGES - 1 < chunks, False)
        async_copy.commit_group()
        b, c = b + BT * b_step, c + BT * c_step
        decayed = b_s.index(buffer).load(B_LAYOUT) if REVERSE else c_s.index(buffer).load(C_LAYOUT)
        if APPLY_SILU:
            decayed = silu(decayed)
        leaving = gl.where(n * BT + decayed_row >= before, decay_out, 0.0)
        weighted_s.store((decayed.to(gl.float32) * leaving[:, None]).to(gl.bfloat16))
        kept = state - one_minus_decay * state
        fence_async_shared()
        if REVERSE:
            updated = warpgroup_mma(weighted_s.permute((1, 0)), c_s.index(buffer), kept, is_async=True)
        else:
            updated = warpgroup_mma(b_s.index(buffer).permute((1, 0)), weighted_s, kept, is_async=True)
        async_copy.wait_group(NUM_STAGES - 2)
        if APPLY_SILU:
            activate(b_s.index(following), B_LAYOUT)
        state = warpgroup_mma_wait(0, deps=[updated])
        buffer = following
    k = gl.arange(0, K, layout=gl.SliceLayout(1, STATE_LAYOUT))
    v = part * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, STATE_LAYOUT))
    place = ((gl.cast(batch, gl.int64) * segments + segment) * H + head) * (K * K)
    gl.store(h_segments + place + k[:, None] * K + v[None, :], state)
