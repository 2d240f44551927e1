"""Forward of packed softmax attention for Hopper: one warp copies tiles, two warpgroups compute.

A unit of work is a tile of queries: 64 tokens of two heads that share keys, one head to each warpgroup, or, where heads
do not come in pairs, 128 tokens of one head. Within a warpgroup the scores of the next block of keys are under way
while those of this one go through the softmax.

Legend: BM queries of a warpgroup, BN keys of a block, D head width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mmkernels.softmax.hopper.copies import copy_for_queries
from mmkernels.softmax.hopper.units import (
    LN2,
    LOG2E,
    barriers,
    masked,
    query_unit,
    turns,
    unit_at,
)


@gluon.jit
def next_block(
    shared, p, o, m, total, row, shift, keys, block, count, scale, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of a block under way while the block before it is added to the output.

    p are the probabilities of the block before, over the largest score m so far; total is the sum of all so far.
    """
    q_s, k_s, v_s, k_ready, k_free, v_ready, v_free = shared
    stage, phase = count % STAGES, (count // STAGES) & 1
    before, before_phase = (count - 1) % STAGES, ((count - 1) // STAGES) & 1
    mbarrier.wait(k_ready.index(stage), phase)
    none = gl.zeros([BM, BN], gl.float32, S_LAYOUT)
    scores = warpgroup_mma(q_s, k_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), before_phase)
    added = warpgroup_mma(p, v_s.index(before), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(stage))
    if MASKED:
        s = masked(s, block, row, shift, keys, S_LAYOUT, BN)
    largest = gl.maximum(m, gl.max(s, 1))
    p32 = gl.exp2(s * scale - (largest * scale)[:, None])
    shrink = gl.exp2((m - largest) * scale)
    o = warpgroup_mma_wait(0, deps=[added])
    mbarrier.arrive(v_free.index(before))
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
    p = gl.convert_layout(p32.to(gl.bfloat16), gl.DotOperandLayout(0, O_LAYOUT, 2))
    return p, o, largest, total * shrink + gl.sum(p32, 1)


@gluon.jit
def compute(
    c: gl.constexpr, tiles, shared, out, units, scale, T, PAIRS: gl.constexpr, HEADS: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What warpgroup c does; the scale is that of powers of two."""
    q_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free = shared
    o_ptr, lse_ptr, o_token, o_head = out
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    STORE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    none = gl.zeros([BM, BN], gl.float32, S_LAYOUT)
    count = 0
    mine = (q_s.index(c), k_s, v_s, k_ready, k_free, v_ready, v_free)
    for turn in range(0, turns(units)):
        unit = unit_at(turn, units)
        if unit < units:
            head, first, end, shift, keys, blocks, whole = query_unit(c, tiles, unit, PAIRS, HEADS, BM, BN)
            row = first + gl.arange(0, BM, layout=gl.SliceLayout(1, S_LAYOUT))
            mbarrier.wait(q_ready.index(0), turn & 1)
            stage, phase = count % STAGES, (count // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            scores = warpgroup_mma(
                q_s.index(c), k_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
            )  # fmt: skip
            s = masked(warpgroup_mma_wait(0, deps=[scores]), blocks - 1, row, shift, keys, S_LAYOUT, BN)
            mbarrier.arrive(k_free.index(stage))
            count += 1
            m = gl.maximum(gl.max(s, 1), -1e30)  # a query may see none of the last block
            p32 = gl.exp2(s * scale - (m * scale)[:, None])
            total = gl.sum(p32, 1)
            p = gl.convert_layout(p32.to(gl.bfloat16), gl.DotOperandLayout(0, O_LAYOUT, 2))
            o = gl.zeros([BM, D], gl.float32, O_LAYOUT)
            for n in range(1, blocks - whole):
                p, o, m, total = next_block(
                    mine, p, o, m, total, row, shift, keys, blocks - 1 - n, count, scale, True, S_LAYOUT, O_LAYOUT, BM,
                    BN, STAGES,
                )  # fmt: skip
                count += 1
            for _n in range(gl.maximum(blocks - whole, 1), blocks):
                p, o, m, total = next_block(
                    mine, p, o, m, total, row, shift, keys, 0, count, scale, False, S_LAYOUT, O_LAYOUT, BM, BN, STAGES
                )  # fmt: skip
                count += 1
            mbarrier.arrive(q_free.index(0))
            stage, phase = (count - 1) % STAGES, ((count - 1) // STAGES) & 1
            mbarrier.wait(v_ready.index(stage), phase)
            added = warpgroup_mma(p, v_s.index(stage), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[added])
            mbarrier.arrive(v_free.index(stage))
            o = o / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
            gl.store(lse_ptr + gl.cast(head, gl.int64) * T + row, (m * scale + gl.log2(total)) * LN2, mask=row < end)
            o_row = first + gl.arange(0, BM, layout=gl.SliceLayout(1, STORE_LAYOUT))
            column = gl.arange(0, D, layout=gl.SliceLayout(0, STORE_LAYOUT))
            at = o_ptr + head * o_head + gl.cast(o_row, gl.int64)[:, None] * o_token + column[None, :]
            gl.store(at, gl.convert_layout(o.to(gl.bfloat16), STORE_LAYOUT), mask=(o_row < end)[:, None])


@gluon.jit(do_not_specialize=["units", "T"])
def softmax_hopper_kernel(
    q_desc, k_desc, v_desc, tiles, o_ptr, lse_ptr, units, scale, T, q_head, k_head, v_head, o_token, o_head,
    PAIRS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp [H, T] of all units."""
    q_s = gl.allocate_shared_memory(gl.bfloat16, [2, BM, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], v_desc.layout)
    q_ready, k_ready, v_ready = barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_free, k_free, v_free = barriers(1, 2), barriers(STAGES, 2), barriers(STAGES, 2)
    shared = (q_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free)
    copied = (q_s, q_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free)
    out = (o_ptr, lse_ptr, o_token, o_head)
    descriptors, strides = (q_desc, q_desc, k_desc, v_desc), (q_head, q_head, k_head, v_head)
    scale *= LOG2E
    gl.warp_specialize([
        (compute, (gl.constexpr(0), tiles, shared, out, units, scale, T, PAIRS, HEADS, BM, BN, D, STAGES)),
        (compute, (gl.constexpr(1), tiles, shared, out, units, scale, T, PAIRS, HEADS, BM, BN, D, STAGES)),
        (copy_for_queries, (
            descriptors, strides, tiles, copied, units, PAIRS, GROUP, HEADS, False, BM, BN, D, STAGES
        )),
    ], [4, 1], [240, 24])  # fmt: skip
