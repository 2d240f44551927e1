"""Gradients of the keys and values of packed softmax attention for Hopper: four products a block of queries.

A unit of work is 128 keys of one key/value head, 64 to each warpgroup, whose gradients stay in registers while the
queries that see them go by, of all heads that read it. Scores are transposed, [keys, queries], so that probabilities
and their gradients are operands of the next products as they lie in registers. Where that makes too few units, several
of them share the heads, and each writes its part in float32.

Legend: BM queries of a step, BN keys of a warpgroup, D head width; S keys, G key/value heads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mmkernels.softmax.hopper.copies import copy_for_keys
from mmkernels.softmax.hopper.units import LOG2E, barriers, query_blocks, read_key_tile, turns, unit_at


@gluon.jit
def add_block(
    shared, dk, dv, at_N, row, shift, is_masked, count, log_scale, P_LAYOUT: gl.constexpr,
    KV_LAYOUT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add what a block of queries adds to the gradients of keys, before their scale, and of values."""
    q_s, do_s, lse_s, delta_s, k_s, v_s, q_ready, q_free, do_ready, do_free = shared
    stage, phase = count % STAGES, (count // STAGES) & 1
    none = gl.zeros([BN, BM], gl.float32, P_LAYOUT)
    mbarrier.wait(q_ready.index(stage), phase)
    scores = warpgroup_mma(k_s, q_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(do_ready.index(stage), phase)
    dp = warpgroup_mma(v_s, do_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[scores])
    p = gl.exp2(s * log_scale - lse_s.index(stage).load(gl.SliceLayout(0, P_LAYOUT))[None, :])
    if is_masked:
        row_M = row + gl.arange(0, BM, layout=gl.SliceLayout(0, P_LAYOUT))
        p = gl.where(at_N[:, None] <= (row_M + shift)[None, :], p, 0.0)
    p_dot = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, KV_LAYOUT, 2))
    dv_sum = warpgroup_mma(p_dot, do_s.index(stage), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - delta_s.index(stage).load(gl.SliceLayout(0, P_LAYOUT))[None, :])
    ds = gl.convert_layout(ds.to(gl.bfloat16), gl.DotOperandLayout(0, KV_LAYOUT, 2))
    dk_sum = warpgroup_mma(ds, q_s.index(stage), dk, is_async=True)
    dv, dk = warpgroup_mma_wait(0, deps=[dv_sum, dk_sum])
    mbarrier.arrive(do_free.index(stage))
    mbarrier.arrive(q_free.index(stage))
    return dk, dv


@gluon.jit
def compute(
    c: gl.constexpr, tiles, shared, out, units, scale, S, splits, G: gl.constexpr, GROUP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What warpgroup c does."""
    q_s, do_s, lse_s, delta_s, k_s, v_s, kv_ready, kv_free, q_ready, q_free, do_ready, do_free = shared
    dk_ptr, dv_ptr = out
    P_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    STORE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    heads = GROUP // splits
    count = 0
    mine = (q_s, do_s, lse_s, delta_s, k_s.index(c), v_s.index(c), q_ready, q_free, do_ready, do_free)
    for turn in range(0, turns(units)):
        unit = unit_at(turn, units)
        if unit < units:
            key, key_end, document, query, query_end, shift = read_key_tile(tiles, unit // (G * splits))
            first, blocks, partly = query_blocks(key, document, query, query_end, shift, BM, 2 * BN)
            part = unit % (G * splits)
            key += c * BN
            dk = gl.zeros([BN, D], gl.float32, KV_LAYOUT)
            dv = gl.zeros([BN, D], gl.float32, KV_LAYOUT)
            at_N = key - document + gl.arange(0, BN, layout=gl.SliceLayout(1, P_LAYOUT))
            mbarrier.wait(kv_ready.index(0), turn & 1)
            for _h in range(0, heads):
                for n in range(0, blocks):
                    dk, dv = add_block(
                        mine, dk, dv, at_N, first + n * BM, shift, n < partly, count,
                        scale * LOG2E, P_LAYOUT, KV_LAYOUT, BM, BN, STAGES,
                    )  # fmt: skip
                    count += 1
            mbarrier.arrive(kv_free.index(0))
            row_N = key + gl.arange(0, BN, layout=gl.SliceLayout(1, STORE_LAYOUT))
            column = gl.arange(0, D, layout=gl.SliceLayout(0, STORE_LAYOUT))
            row = gl.cast(part % splits, gl.int64) * S + row_N
            at = (row * G + part // splits)[:, None] * D + column[None, :]
            number = dk_ptr.dtype.element_ty
            gl.store(dv_ptr + at, gl.convert_layout(dv.to(number), STORE_LAYOUT), mask=(row_N < key_end)[:, None])
            dk = (dk * scale).to(number)
            gl.store(dk_ptr + at, gl.convert_layout(dk, STORE_LAYOUT), mask=(row_N < key_end)[:, None])


@gluon.jit(do_not_specialize=["units", "T", "S", "splits"])
def softmax_hopper_dkv_kernel(
    q_desc, do_desc, k_desc, v_desc, tiles, lse_ptr, delta_ptr, dk_ptr, dv_ptr, units, scale, T, S, splits, q_head,
    do_head, k_head, v_head, G: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Write dk and dv [splits, S, G, D] of all units."""
    q_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, D], do_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_s = gl.allocate_shared_memory(gl.bfloat16, [2, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [2, BN, D], v_desc.layout)
    kv_ready, kv_free, q_free, do_free = barriers(1, 1), barriers(1, 2), barriers(STAGES, 2), barriers(STAGES, 2)
    q_ready, do_ready = barriers(STAGES, 2), barriers(STAGES, 2)  # the tile, and what the copying warp writes itself
    shared = (q_s, do_s, lse_s, delta_s, k_s, v_s, kv_ready, kv_free, q_ready, q_free, do_ready, do_free)
    descriptors, strides = (q_desc, do_desc, k_desc, v_desc), (q_head, do_head, k_head, v_head)
    out, stats = (dk_ptr, dv_ptr), (lse_ptr, delta_ptr)
    gl.warp_specialize([
        (compute, (gl.constexpr(0), tiles, shared, out, units, scale, S, splits, G, GROUP, BM, BN, D, STAGES)),
        (compute, (gl.constexpr(1), tiles, shared, out, units, scale, S, splits, G, GROUP, BM, BN, D, STAGES)),
        (copy_for_keys, (
            descriptors, strides, stats, tiles, shared, units, T, splits, G, GROUP, BM, BN, D, STAGES
        )),
    ], [4, 1], [240, 24])  # fmt: skip
