"""What the warp that copies does in Hopper's kernels for packed softmax attention: it fetches tiles into shared memory.

Barriers come in pairs: a tile is `ready` when it has come, and its place is `free` when both warpgroups have read it.

Legend: BM queries of a warpgroup or step, BN keys of a block, D head width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mmkernels.softmax.hopper.units import (
    LOG2E,
    key_blocks,
    query_blocks,
    read_key_tile,
    read_query_tile,
    turns,
    unit_at,
)

# Triton 3.9 renamed it, and left a stub under the old name.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
ELEMENT: gl.constexpr = gl.constexpr(2)  # bytes


@gluon.jit
def copy_block(desc, row, column, ready, free, target, count, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Fetch one tile into its stage of a ring, when that is free."""
    stage, phase = count % STAGES, (count // STAGES) & 1
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), BN * D * ELEMENT)
    copy_tile(desc, [row, column], ready.index(stage), target.index(stage))


@gluon.jit
def copy_for_queries(
    descriptors, strides, tiles, shared, units, PAIRS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr,
    BACKWARD: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch each unit's queries (and the gradients of their outputs), then keys and values, the last block first."""
    q_desc, do_desc, k_desc, v_desc = descriptors
    q_head, do_head, k_head, v_head = strides
    q_s, do_s, k_s, v_s, q_ready, q_free, k_ready, k_free, v_ready, v_free = shared
    ROWS: gl.constexpr = BM * (3 - HEADS)
    TENSORS: gl.constexpr = 2 if BACKWARD else 1
    count = 0
    for turn in range(0, turns(units)):
        unit = unit_at(turn, units)
        if unit < units:
            first, end, key, shift, keys = read_query_tile(tiles, unit // PAIRS)
            head = unit % PAIRS * HEADS
            group = head // GROUP
            blocks, _whole = key_blocks(first, end, shift, keys, ROWS, BN)
            mbarrier.wait(q_free.index(0), (turn & 1) ^ 1)
            ready = q_ready.index(0)
            mbarrier.expect(ready, 2 * TENSORS * BM * D * ELEMENT)
            for c in gl.static_range(2):
                row = first + (0 if HEADS == 2 else c * BM)
                mine = head + (c if HEADS == 2 else 0)
                copy_tile(q_desc, [row, mine * q_head], ready, q_s.index(c))
                if BACKWARD:
                    copy_tile(do_desc, [row, mine * do_head], ready, do_s.index(c))
            for n in range(0, blocks):
                row = key + (blocks - 1 - n) * BN
                copy_block(k_desc, row, group * k_head, k_ready, k_free, k_s, count, BN, D, STAGES)
                copy_block(v_desc, row, group * v_head, v_ready, v_free, v_s, count, BN, D, STAGES)
                count += 1


@gluon.jit
def copy_for_keys(
    descriptors, strides, stats, tiles, shared, units, T, splits, G: gl.constexpr, GROUP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch each unit's keys and values, then the queries of one head after another, and what belongs to these."""
    q_desc, do_desc, k_desc, v_desc = descriptors
    q_head, do_head, k_head, v_head = strides
    lse_ptr, delta_ptr = stats
    q_s, do_s, lse_s, delta_s, k_s, v_s, kv_ready, kv_free, q_ready, q_free, do_ready, do_free = shared
    heads = GROUP // splits
    count = 0
    at_M = gl.arange(0, BM, layout=gl.BlockedLayout([BM // 32], [32], [1], [0]))
    for turn in range(0, turns(units)):
        unit = unit_at(turn, units)
        if unit < units:
            key, _key_end, document, query, query_end, shift = read_key_tile(tiles, unit // (G * splits))
            first, blocks, _partly = query_blocks(key, document, query, query_end, shift, BM, 2 * BN)
            part = unit % (G * splits)
            group = part // splits
            mbarrier.wait(kv_free.index(0), (turn & 1) ^ 1)
            ready = kv_ready.index(0)
            mbarrier.expect(ready, 4 * BN * D * ELEMENT)
            for c in gl.static_range(2):
                copy_tile(k_desc, [key + c * BN, group * k_head], ready, k_s.index(c))
                copy_tile(v_desc, [key + c * BN, group * v_head], ready, v_s.index(c))
            for h in range(0, heads):
                head = part * heads + h
                at = gl.cast(head, gl.int64) * T
                for n in range(0, blocks):
                    row_M = first + n * BM + at_M
                    lse = gl.load(lse_ptr + at + row_M, mask=row_M < query_end, other=float("inf"))
                    delta = gl.load(delta_ptr + at + row_M, mask=row_M < query_end, other=0.0)
                    stage = count % STAGES
                    copy_block(q_desc, first + n * BM, head * q_head, q_ready, q_free, q_s, count, BM, D, STAGES)
                    lse_s.index(stage).store(lse * LOG2E)
                    mbarrier.arrive(q_ready.index(stage))
                    copy_block(do_desc, first + n * BM, head * do_head, do_ready, do_free, do_s, count, BM, D, STAGES)
                    delta_s.index(stage).store(delta)
                    mbarrier.arrive(do_ready.index(stage))
                    count += 1
