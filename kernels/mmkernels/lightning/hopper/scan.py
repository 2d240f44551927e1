"""The walk for Hopper's tensor cores, in Gluon: what `walk.py` does, with the order of the products in our hands.

Triton waits for each product where it stands. Here the products of a chunk overlap with the arithmetic around them: its
scores are under way since the chunk before; ``a S`` and the state's update run while the scores are decayed and the
next chunk goes through SiLU; the next chunk's scores run while the output is stored. Copies to shared memory are asked
for STAGES - 1 chunks ahead, at the top of a chunk.

For bfloat16 heads of 64 or 128 in chunks of 64. Shape letters: C tokens of a chunk, D width of a and b, BE columns of c
that a program holds, state [D, BE].
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

from mmkernels.lightning.device.padded_chunks import slot_pad, slot_until
from mmkernels.lightning.device.scan import add_entering_state, unit_of_work
from mmkernels.lightning.device.tile import LOG2E, either, for_role, loss_over, silu, silu_slope, walk_base

# Triton 3.9 renamed it, and left a stub under the old name.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def load_cursor(n, pad, until, hi, words_ptr, C: gl.constexpr, SLOTS: gl.constexpr):
    """Padding and end of the document of the chunk after n, and how many positions further that starts."""
    advance = C
    if SLOTS:
        closes = n + 1 == until
        word = gl.load(words_ptr + 2 + n, mask=closes & (until < hi), other=0)
        pad = slot_pad(word)
        advance = C - pad
        until = gl.where(closes, slot_until(word), until)
    else:
        pad = pad * 0
    return pad, until, advance


@gluon.jit
def copy_rows(target, source, row, pad, wanted, MASKED: gl.constexpr):
    """Ask for a tile; rows before ``pad`` stay as they are."""
    if not MASKED:
        pad = 0
    copy_async(target, source, mask=((row >= pad) & wanted)[:, None])


@gluon.jit
def copy_chunk(a_s, b_s, c_s, a, b, c, row, slim_row, pad, wanted, MASKED: gl.constexpr):
    """Ask for all tiles of a chunk, as one group."""
    copy_rows(a_s, a, row, pad, wanted, MASKED)
    copy_rows(b_s, b, row, pad, wanted, MASKED)
    copy_rows(c_s, c, slim_row, pad, wanted, MASKED)
    async_copy.commit_group()


@gluon.jit
def activate(tile, LAYOUT: gl.constexpr):
    """SiLU of a tile in shared memory, in place."""
    tile.store(silu(tile.load(LAYOUT)))


@gluon.jit
def activate_chunk(a_s, b_s, c_s, WIDE: gl.constexpr, SLIM: gl.constexpr):
    """SiLU of all tiles of a chunk."""
    activate(a_s, WIDE)
    activate(b_s, WIDE)
    activate(c_s, SLIM)


@gluon.jit
def walk_hopper(
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, words_ptr, init_ptr, local_ptr, leave_ptr,
    a_head, b_head, c_head, out_head, raw_head, state_d, state_e, tokens, heads, segments, share, part, head, z,
    leaves, a_token, b_token, c_token, out_token, raw_token,
    D: gl.constexpr, C: gl.constexpr, BE: gl.constexpr,
    REVERSE: gl.constexpr, MASKED: gl.constexpr, SLOTS: gl.constexpr, DOCUMENTS: gl.constexpr,
    HAS_INIT: gl.constexpr, HAS_LOCAL: gl.constexpr, LEAVE: gl.constexpr, SILU_GRAD: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, RAW: gl.constexpr = False, WEIGH_B: gl.constexpr = False,
):  # fmt: skip
    """``walk.walk_unit``. RAW: a, b and c are SiLU of what is in memory. Two warpgroups (GROUPS) share the work:
    each has half of the columns of an output, and half of the rows of the state.

    Of each pair that enters the state one side takes the decay, and is rounded once more: c, which is half as large, or
    with WEIGH_B b. Over b's columns the next product sums, so that those errors average out where c's do not.
    """
    AB: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4 * GROUPS, 1], [1, 0])
    CE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BE, BE // 8], [4 * GROUPS, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BE // GROUPS, 16])
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, BE, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], gl.bfloat16)
    slim: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BE], gl.bfloat16)
    a_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, D], wide)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, D], wide)
    c_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BE], slim)
    weighted_s = gl.allocate_shared_memory(gl.bfloat16, [C, D if WEIGH_B else BE], wide if WEIGH_B else slim)
    state_s = gl.allocate_shared_memory(
        gl.bfloat16, [D, BE], gl.NVMMASharedLayout.get_default_for([D, BE], gl.bfloat16)
    )
    if GROUPS == 2:  # a product of one warpgroup takes scores of both
        scores_s = gl.allocate_shared_memory(
            gl.bfloat16, [C, C], gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
        )

    batch, lo, hi, start, pad, ends = unit_of_work(
        z, bounds_ptr, words_ptr, segments, share, tokens, C, REVERSE, SLOTS, DOCUMENTS
    )
    owner = z if DOCUMENTS else batch
    a, a_step = walk_base(a_ptr, batch, head, a_token, a_head, tokens, start, REVERSE)
    b, b_step = walk_base(b_ptr, batch, head, b_token, b_head, tokens, start, REVERSE)
    c, c_step = walk_base(c_ptr, batch, head, c_token, c_head, tokens, start, REVERSE)
    out, out_step = walk_base(out_ptr, batch, head, out_token, out_head, tokens, start, REVERSE)
    raw, raw_step = walk_base(raw_ptr, batch, head, raw_token, raw_head, tokens, start, REVERSE)
    c, out, raw = c + part * BE, out + part * BE, raw + part * BE
    slope = gl.load(slopes_ptr + head).to(gl.float32)

    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, AB)), gl.arange(0, D, layout=gl.SliceLayout(0, AB))
    slim_row, slim_col = gl.arange(0, C, layout=gl.SliceLayout(1, CE)), gl.arange(0, BE, layout=gl.SliceLayout(0, CE))
    a_at, b_at = row[:, None] * a_step + col[None, :], row[:, None] * b_step + col[None, :]
    c_at, out_at = slim_row[:, None] * c_step + slim_col[None, :], slim_row[:, None] * out_step + slim_col[None, :]
    raw_at = slim_row[:, None] * raw_step + slim_col[None, :]
    d, e = gl.arange(0, D, layout=gl.SliceLayout(1, STATE)), gl.arange(0, BE, layout=gl.SliceLayout(0, STATE))
    de = d[:, None] * state_d + (part * BE + e)[None, :] * state_e
    none = gl.zeros([C, BE], gl.float32, OUT)
    no_scores = gl.zeros([C, C], gl.float32, SCORES)
    state = add_entering_state(
        gl.zeros([D, BE], gl.float32, STATE), init_ptr, local_ptr, bounds_ptr, words_ptr, owner, batch, lo, head, heads,
        segments, share, slope, tokens, de, de >= 0, HAS_INIT, HAS_LOCAL, SLOTS, D * D, C,
    )  # fmt: skip

    SHIFT: gl.constexpr = 1 if REVERSE else 0
    i, j = gl.arange(0, C, layout=gl.SliceLayout(1, SCORES)), gl.arange(0, C, layout=gl.SliceLayout(0, SCORES))
    lag = i[:, None] - j[None, :]
    decay = gl.where(lag >= 0, gl.exp2(-slope * LOG2E * lag), 0.0)
    weighed_row = row if WEIGH_B else slim_row
    outof = gl.exp2(-slope * LOG2E * (C - 1 + SHIFT - weighed_row))
    out_row = gl.arange(0, C, layout=gl.SliceLayout(1, OUT))
    into = gl.exp2(-slope * LOG2E * (out_row + 1 - SHIFT))
    lost = loss_over(slope, C)
    loses = loss_over(slope, C - pad)
    until, count = hi, hi
    if SLOTS:
        count = gl.load(words_ptr).to(gl.int32)
        until = slot_until(gl.load(words_ptr + 1 + gl.maximum(gl.minimum(lo, count - 1), 0)))
    if MASKED:  # rows that no copy fills meet zeros: they must be numbers
        for s in gl.static_range(STAGES):
            b_s.index(s).store(gl.zeros([C, D], gl.bfloat16, AB))
            c_s.index(s).store(gl.zeros([C, BE], gl.bfloat16, CE))

    ahead, ahead_pad, ahead_until = lo, pad, until
    for s in gl.static_range(STAGES - 1):
        copy_chunk(
            a_s.index(s), b_s.index(s), c_s.index(s), a + a_at, b + b_at, c + c_at, row, slim_row, ahead_pad,
            ahead < hi, MASKED,
        )  # fmt: skip
        ahead_pad, ahead_until, advance = load_cursor(ahead, ahead_pad, ahead_until, hi, words_ptr, C, SLOTS)
        ahead = ahead + 1
        a, b, c = a + advance * a_step, b + advance * b_step, c + advance * c_step
    async_copy.wait_group(STAGES - 2)
    if RAW:
        activate_chunk(a_s.index(0), b_s.index(0), c_s.index(0), AB, CE)
    fence_async_shared()
    scores = warpgroup_mma(a_s.index(0), b_s.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    buffer = 0
    for n in range(lo, hi):
        following = gl.where(buffer == STAGES - 1, 0, buffer + 1)
        free = gl.where(buffer == 0, STAGES - 1, buffer - 1)  # of the chunk before: its products are done
        copy_chunk(
            a_s.index(free), b_s.index(free), c_s.index(free), a + a_at, b + b_at, c + c_at, row, slim_row, ahead_pad,
            ahead < hi, MASKED,
        )  # fmt: skip
        ahead_pad, ahead_until, advance = load_cursor(ahead, ahead_pad, ahead_until, hi, words_ptr, C, SLOTS)
        ahead = ahead + 1
        a, b, c = a + advance * a_step, b + advance * b_step, c + advance * c_step

        if SILU_GRAD:
            raw_tile = gl.load(raw + raw_at, mask=(slim_row >= pad)[:, None] if MASKED else None)
        seen, leaving, loss = into, outof, lost
        if MASKED:
            leaving = gl.where(weighed_row >= pad, leaving, 0.0)
        if MASKED and HAS_INIT:  # else no state meets padding
            seen = gl.exp2(-slope * LOG2E * gl.maximum(out_row + 1 - SHIFT - pad, 0))
            loss = loses
        if SLOTS:
            forgets = (n + 1 == until) & (until < count)  # another document follows
            leaving = gl.where(forgets, 0.0, leaving)
            loss = gl.where(forgets, 1.0, loss)
        weighed = b_s.index(buffer).load(AB) if WEIGH_B else c_s.index(buffer).load(CE)
        weighted_s.store((weighed.to(gl.float32) * leaving[:, None]).to(gl.bfloat16))
        state_s.store(state.to(gl.bfloat16))
        kept = state - loss * state
        fence_async_shared()
        o = warpgroup_mma(a_s.index(buffer), state_s, none, use_acc=False, is_async=True)
        if WEIGH_B:
            updated = warpgroup_mma(weighted_s.permute((1, 0)), c_s.index(buffer), kept, is_async=True)
        else:
            updated = warpgroup_mma(b_s.index(buffer).permute((1, 0)), weighted_s, kept, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores]) * decay
        if MASKED:
            scores = gl.where(j[None, :] >= pad, scores, 0.0)
        if GROUPS == 2:
            scores_s.store(scores.to(gl.bfloat16))
            operand = scores_s
        else:
            operand = gl.convert_layout(scores.to(gl.bfloat16), gl.DotOperandLayout(0, OUT, 2))
        if RAW or GROUPS == 2:
            async_copy.wait_group(STAGES - 2)
            if RAW:
                activate_chunk(a_s.index(following), b_s.index(following), c_s.index(following), AB, CE)
            fence_async_shared()
        o = warpgroup_mma_wait(1, deps=[o])
        o = warpgroup_mma(operand, c_s.index(buffer), o * seen[:, None], is_async=True)
        if not (RAW or GROUPS == 2):
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
        scores = warpgroup_mma(
            a_s.index(following), b_s.index(following).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        if SILU_GRAD:
            slope_tile = silu_slope(gl.convert_layout(raw_tile, OUT))
        o, state = warpgroup_mma_wait(1, deps=[o, updated])
        if SILU_GRAD:
            o *= slope_tile
        o = gl.convert_layout(o.to(gl.bfloat16), CE)
        if MASKED:
            gl.store(out + out_at, o, mask=(slim_row >= pad)[:, None])
            loses = lost
        else:
            gl.store(out + out_at, o)
        pad, until, advance = load_cursor(n, pad, until, hi, words_ptr, C, SLOTS)
        out, raw = out + advance * out_step, raw + advance * raw_step
        buffer = following
    warpgroup_mma_wait(0, deps=[scores])
    if LEAVE:
        if leaves & ends:
            gl.store(leave_ptr + (gl.cast(owner, gl.int64) * heads + head) * (D * D) + de, state)


@gluon.jit
def scan_hopper_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, words_ptr, init_ptr, local_ptr, leave_ptr,
    a_head, b_head, c_head, out_head, raw_head, state_d, state_e, tokens, heads, segments, share,
    a_token: gl.constexpr, b_token: gl.constexpr, c_token: gl.constexpr,
    out_token: gl.constexpr, raw_token: gl.constexpr,
    D: gl.constexpr, C: gl.constexpr, BE: gl.constexpr,
    REVERSE: gl.constexpr, MASKED: gl.constexpr, SLOTS: gl.constexpr, DOCUMENTS: gl.constexpr,
    HAS_INIT: gl.constexpr, HAS_LOCAL: gl.constexpr, LEAVE: gl.constexpr, SILU_GRAD: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, RAW: gl.constexpr = False,
):  # fmt: skip
    """`scan.scan_kernel`."""
    pid = gl.program_id(0)
    PARTS: gl.constexpr = D // BE
    walk_hopper(
        a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, words_ptr, init_ptr, local_ptr, leave_ptr,
        a_head, b_head, c_head, out_head, raw_head, state_d, state_e,
        tokens, heads, segments, share, pid % PARTS, pid // PARTS % heads, pid // (PARTS * heads), pid >= 0,
        a_token, b_token, c_token, out_token, raw_token, D, C, BE, REVERSE, MASKED, SLOTS, DOCUMENTS,
        HAS_INIT, HAS_LOCAL, LEAVE, SILU_GRAD, STAGES, GROUPS, RAW,
    )  # fmt: skip


@gluon.jit
def key_value_hopper_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr, slopes_ptr, bounds_ptr,
    words_ptr, init_ptr, local_ptr, leave_ptr,
    q_head, k_head, v_head, do_head, dk_head, dv_head, k_raw_head, v_raw_head, tokens, heads, segments, share,
    q_token: gl.constexpr, k_token: gl.constexpr, v_token: gl.constexpr, do_token: gl.constexpr,
    dk_token: gl.constexpr, dv_token: gl.constexpr, k_raw_token: gl.constexpr, v_raw_token: gl.constexpr,
    D: gl.constexpr, C: gl.constexpr, BE: gl.constexpr,
    MASKED: gl.constexpr, SLOTS: gl.constexpr, DOCUMENTS: gl.constexpr, HAS_INIT: gl.constexpr,
    HAS_LOCAL: gl.constexpr, LEAVE: gl.constexpr, SILU_GRAD: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    """`scan.key_value_kernel`."""
    pid = gl.program_id(0)
    PARTS: gl.constexpr = D // BE
    keys = pid % (2 * PARTS) >= PARTS
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr = for_role(
        keys, q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr
    )
    a_head, b_head, c_head, out_head, raw_head = for_role(
        keys, q_head, k_head, v_head, do_head, dk_head, dv_head, k_raw_head, v_raw_head
    )
    walk_hopper(
        a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, words_ptr, init_ptr, local_ptr, leave_ptr,
        a_head, b_head, c_head, out_head, raw_head, gl.where(keys, 1, D), gl.where(keys, D, 1), tokens, heads, segments,
        share, pid % PARTS, pid // (2 * PARTS) % heads, pid // (2 * PARTS * heads), pid % (2 * PARTS) < PARTS,
        either(keys, v_token, k_token), either(keys, do_token, q_token), either(keys, q_token, do_token),
        either(keys, dk_token, dv_token), either(keys, k_raw_token, v_raw_token),
        D, C, BE, True, MASKED, SLOTS, DOCUMENTS, HAS_INIT, HAS_LOCAL, LEAVE, SILU_GRAD, STAGES,
        GROUPS, False, True,
    )  # fmt: skip


KERNELS = {
    "scan": (scan_hopper_kernel, 64, 4, 1),
    "scan, SiLU's derivative, packed": (scan_hopper_kernel, 64, 4, 2),
    "key_value": (key_value_hopper_kernel, 128, 3, 2),
}
"""Kernel, most columns of a program, pipeline stages and warpgroups by launch, as measured on an H100.

With 128 columns programs read half as much of what others read too through the L2 cache, which limits dk and dv (1.08
instead of 1.34 ms); a scan is limited by memory, and wants the programs (0.72 ms; 0.74 with two warpgroups). One
with SiLU's derivative takes 1.12 ms, 1.43 with two warpgroups; but 1.35 and 1.10 when the row is packed.
"""
