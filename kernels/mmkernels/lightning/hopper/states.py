"""States of segments for Hopper, in Gluon: what `states.py` does, with SiLU in shared memory while a product runs.

For bfloat16 heads of 64 or 128. Shape letters: C tokens of a chunk, D width of b, BE columns of c that a program holds.
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

from mmkernels.lightning.device.tile import LOG2E, loss_over, silu, walk_base
from mmkernels.lightning.hopper.scan import activate, copy_rows
from mmkernels.lightning.triton.states import stretch


@gluon.jit
def states_hopper_kernel(
    b_ptr, c_ptr, slopes_ptr, origins_ptr, words_ptr, local_ptr, b_head, c_head,
    tokens, heads, segments, given, length, pad,
    b_token: gl.constexpr, c_token: gl.constexpr, D: gl.constexpr, C: gl.constexpr, BE: gl.constexpr,
    REVERSE: gl.constexpr, SLOTS: gl.constexpr, RAW: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """``states.states_kernel`` for segments of SLOTS, or of ``length`` positions of a row that is not packed.

    The side of each pair that takes the decay, and is rounded once more, is what the walk that goes on from the states
    weighs: b of a reversed one, else c.
    """
    AB: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    CE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BE, BE // 8], [4, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BE, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], gl.bfloat16)
    slim: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BE], gl.bfloat16)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, D], wide)
    c_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BE], slim)
    weighted_s = gl.allocate_shared_memory(gl.bfloat16, [C, D if REVERSE else BE], wide if REVERSE else slim)

    pid = gl.program_id(0)
    PARTS: gl.constexpr = D // BE
    part, head, z = pid % PARTS, pid // PARTS % heads, pid // (PARTS * heads)
    batch, segment = z // given, z % given
    slope = gl.load(slopes_ptr + head).to(gl.float32)
    first, hi, chunks = stretch(
        origins_ptr, words_ptr, segment, segments, length, pad, 0, slope, tokens, C, REVERSE, SLOTS, False
    )
    SHIFT: gl.constexpr = 1 if REVERSE else 0
    begin = hi - chunks * C  # chunks end where the segment ends; the first one may begin before ``first``
    b, b_step = walk_base(b_ptr, batch, head, b_token, b_head, tokens, begin, REVERSE)
    c, c_step = walk_base(c_ptr, batch, head, c_token, c_head, tokens, begin, REVERSE)
    c += part * BE
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, AB)), gl.arange(0, D, layout=gl.SliceLayout(0, AB))
    slim_row, slim_col = gl.arange(0, C, layout=gl.SliceLayout(1, CE)), gl.arange(0, BE, layout=gl.SliceLayout(0, CE))
    b_at, c_at = row[:, None] * b_step + col[None, :], slim_row[:, None] * c_step + slim_col[None, :]
    weighed_row = row if REVERSE else slim_row
    outof = gl.exp2(-slope * LOG2E * (C - 1 + SHIFT - weighed_row))
    lost = loss_over(slope, C)
    state = gl.zeros([D, BE], gl.float32, MMA)
    b_s.index(0).store(gl.zeros([C, D], gl.bfloat16, AB))  # rows that no copy fills meet zeros: they must be numbers
    c_s.index(0).store(gl.zeros([C, BE], gl.bfloat16, CE))
    before = first - begin
    for s in gl.static_range(STAGES - 1):
        copy_rows(b_s.index(s), b + b_at, row, before, s < chunks, s == 0)
        copy_rows(c_s.index(s), c + c_at, slim_row, before, s < chunks, s == 0)
        async_copy.commit_group()
        b, c = b + C * b_step, c + C * c_step
    async_copy.wait_group(STAGES - 2)
    if RAW:
        activate(b_s.index(0), AB)
    buffer = 0
    for n in range(0, chunks):
        following = gl.where(buffer == STAGES - 1, 0, buffer + 1)
        free = gl.where(buffer == 0, STAGES - 1, buffer - 1)
        copy_rows(b_s.index(free), b + b_at, row, 0, n + STAGES - 1 < chunks, False)
        copy_rows(c_s.index(free), c + c_at, slim_row, 0, n + STAGES - 1 < chunks, False)
        async_copy.commit_group()
        b, c = b + C * b_step, c + C * c_step
        weighed = b_s.index(buffer).load(AB) if REVERSE else c_s.index(buffer).load(CE)
        if RAW:
            weighed = silu(weighed)
        leaving = gl.where(n * C + weighed_row >= before, outof, 0.0)
        weighted_s.store((weighed.to(gl.float32) * leaving[:, None]).to(gl.bfloat16))
        kept = state - lost * state
        fence_async_shared()
        if REVERSE:
            updated = warpgroup_mma(weighted_s.permute((1, 0)), c_s.index(buffer), kept, is_async=True)
        else:
            updated = warpgroup_mma(b_s.index(buffer).permute((1, 0)), weighted_s, kept, is_async=True)
        async_copy.wait_group(STAGES - 2)
        if RAW:
            activate(b_s.index(following), AB)
        state = warpgroup_mma_wait(0, deps=[updated])
        buffer = following
    d, e = gl.arange(0, D, layout=gl.SliceLayout(1, MMA)), part * BE + gl.arange(0, BE, layout=gl.SliceLayout(0, MMA))
    place = ((gl.cast(batch, gl.int64) * segments + segment) * heads + head) * (D * D)
    gl.store(local_ptr + place + d[:, None] * D + e[None, :], state)
