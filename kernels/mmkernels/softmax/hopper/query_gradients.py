"""Gradients of the queries of packed softmax attention for Hopper: the forward's units, three products a block.

On the way it computes `delta = do . o` of each query, which the gradients of keys need too. One warpgroup's products
run under the other's arithmetic.

Legend: BM queries of a warpgroup, BN keys of a block, D head width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mmkernels.softmax.hopper.copies import copy_for_queries
from mmkernels.softmax.hopper.units import LOG2E, barriers, masked, query_unit, turns, unit_at


@gluon.jit
def add_block(
    shared, dq, lse, delta, row, shift, keys, block, is_masked, count, log_scale, S_LAYOUT: gl.constexpr,
    Q_LAYOUT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add what a block of keys adds to the gradients of the queries, before their scale."""
    q_s, do_s, k_s, v_s, k_ready, k_free, v_ready, v_free = shared
    stage, phase = count % STAGES, (count // STAGES) & 1
    none = gl.zeros([BM, BN], gl.float32, S_LAYOUT)
    mbarrier.wait(k_ready.index(stage), phase)
    scores = warpgroup_mma(q_s, k_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(stage), phase)
    dp = warpgroup_mma(do_s, v_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[scores])
    if is_masked:
        s = masked(s, block, row, shift, keys, S_LAYOUT, BN)
    p = gl.exp2(s * log_scale - lse[:, None])
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_free.index(stage))
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(gl.bfloat16), gl.DotOperandLayout(0, Q_LAYOUT, 2))
    added = warpgroup_mma(ds, k_s.index(stage), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[added])
    mbarrier.arrive(k_free.index(stage))
    return dq


@gluon.jit
def compute(
    c: gl.constexpr, tiles, shared, given, out, units, scale, T, PAIRS: gl.constexpr, HEADS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What warpgroup c does."""
    q_s, do_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free = shared
    o_ptr, o_token, o_head, lse_ptr = given
    dq_ptr, delta_ptr = out
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    STORE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    count = 0
    mine = (q_s.index(c), do_s.index(c), k_s, v_s, k_ready, k_free, v_ready, v_free)
    column = gl.arange(0, D, layout=gl.SliceLayout(0, STORE_LAYOUT))
    for turn in range(0, turns(units)):
        unit = unit_at(turn, units)
        if unit < units:
            head, first, end, shift, keys, blocks, whole = query_unit(c, tiles, unit, PAIRS, HEADS, BM, BN)
            row = first + gl.arange(0, BM, layout=gl.SliceLayout(1, S_LAYOUT))
            wide_row = first + gl.arange(0, BM, layout=gl.SliceLayout(1, STORE_LAYOUT))
            o_at = o_ptr + head * o_head + gl.cast(wide_row, gl.int64)[:, None] * o_token + column[None, :]
            o = gl.load(o_at, mask=(wide_row < end)[:, None], other=0.0)
            at = gl.cast(head, gl.int64) * T
            lse = gl.load(lse_ptr + at + row, mask=row < end, other=float("inf")) * LOG2E
            mbarrier.wait(q_ready.index(0), turn & 1)
            delta = gl.sum(o.to(gl.float32) * do_s.index(c).load(STORE_LAYOUT).to(gl.float32), 1)
            gl.store(delta_ptr + at + wide_row, delta, mask=wide_row < end)
            delta = gl.convert_layout(delta, gl.SliceLayout(1, S_LAYOUT))
            dq = gl.zeros([BM, D], gl.float32, Q_LAYOUT)
            for n in range(0, blocks):
                dq = add_block(
                    mine, dq, lse, delta, row, shift, keys, blocks - 1 - n, n < blocks - whole, count, scale * LOG2E,
                    S_LAYOUT, Q_LAYOUT, BM, BN, STAGES,
                )  # fmt: skip
                count += 1
            mbarrier.arrive(q_free.index(0))
            dq_at = dq_ptr + (gl.cast(wide_row, gl.int64) * (PAIRS * HEADS) + head)[:, None] * D + column[None, :]
            gl.store(
                dq_at, gl.convert_layout((dq * scale).to(gl.bfloat16), STORE_LAYOUT), mask=(wide_row < end)[:, None]
            )


@gluon.jit(do_not_specialize=["units", "T"])
def softmax_hopper_dq_kernel(
    q_desc, do_desc, k_desc, v_desc, tiles, o_ptr, lse_ptr, delta_ptr, dq_ptr, units, scale, T, q_head, do_head, k_head,
    v_head, o_token, o_head, PAIRS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Write dq [T, H, D] and delta [H, T] of all units."""
    q_s = gl.allocate_shared_memory(gl.bfloat16, [2, BM, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(gl.bfloat16, [2, BM, D], do_desc.layout)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], v_desc.layout)
    q_ready, k_ready, v_ready = barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_free, k_free, v_free = barriers(1, 2), barriers(STAGES, 2), barriers(STAGES, 2)
    shared = (q_s, do_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free)
    given, out = (o_ptr, o_token, o_head, lse_ptr), (dq_ptr, delta_ptr)
    descriptors, strides = (q_desc, do_desc, k_desc, v_desc), (q_head, do_head, k_head, v_head)
    gl.warp_specialize([
        (compute, (gl.constexpr(0), tiles, shared, given, out, units, scale, T, PAIRS, HEADS, BM, BN, D, STAGES)),
        (compute, (gl.constexpr(1), tiles, shared, given, out, units, scale, T, PAIRS, HEADS, BM, BN, D, STAGES)),
        (copy_for_queries, (
            descriptors, strides, tiles, shared, units, PAIRS, GROUP, HEADS, True, BM, BN, D, STAGES
        )),
    ], [4, 1], [240, 24])  # fmt: skip
