"""One decode step of softmax attention over keys in pages, as two Triton kernels: splits of the keys, and their join.

Legend: N documents, H heads, G key/value heads, D head width (`WIDTH`), L tokens of a page (`PAGE`). A program of the
first kernel takes one document, one key/value head with its H / G query heads (`GROUP`), and one of `SPLITS` runs of
the keys; all sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.lightning.device.tile import dot


@triton.jit
def paged_step_kernel(
    q_ptr, k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, table_ptr, keys_ptr, part_ptr, part_lse_ptr, scale,
    q_stride_n, q_stride_h, k_stride_n, k_stride_g, v_stride_n, v_stride_g,
    pages_stride_p, pages_stride_l, pages_stride_g, table_stride_n,
    GROUP: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Attend to one run of a document's keys; the first run adds the new token, and writes its key and value.

    Output [N, H, SPLITS, D] of the run alone, unwritten without keys, and its log-sum-exp [N, H, SPLITS], then -inf.
    """
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    row = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    in_rows = row < GROUP
    in_width = d < WIDTH
    in_tile = in_rows[:, None] & in_width[None, :]
    h = g * GROUP + row
    count = tl.load(keys_ptr + n)
    old = count - 1  # keys in the pages; the new one is in registers
    # Runs are as even as blocks allow, of LEAST blocks at least: a short document has one.
    blocks = tl.cdiv(old, BLOCK_S)
    each = tl.maximum(tl.cdiv(blocks, SPLITS), LEAST)
    begin = split * each
    end = tl.minimum(begin + each, blocks)
    q = tl.load(q_ptr + n * q_stride_n + h[:, None] * q_stride_h + d[None, :], mask=in_tile, other=0.0)
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    if (split == 0) & (count > 0):
        k = tl.load(k_ptr + n * k_stride_n + g * k_stride_g + d, mask=in_width, other=0.0)
        v = tl.load(v_ptr + n * v_stride_n + g * v_stride_g + d, mask=in_width, other=0.0)
        page = tl.load(table_ptr + n * table_stride_n + old // PAGE)
        place = page * pages_stride_p + (old % PAGE) * pages_stride_l + g * pages_stride_g + d
        tl.store(k_pages_ptr + place, k, mask=in_width)
        tl.store(v_pages_ptr + place, v, mask=in_width)
        largest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
        total = tl.full([BLOCK_H], 1.0, tl.float32)
        acc += v.to(tl.float32)[None, :]
    for block in range(begin, end):
        t = block * BLOCK_S + tl.arange(0, BLOCK_S)
        seen = t < old
        page = tl.load(table_ptr + n * table_stride_n + t // PAGE, mask=seen, other=0)
        places = page * pages_stride_p + (t % PAGE) * pages_stride_l + g * pages_stride_g
        inside = seen[:, None] & in_width[None, :]
        k = tl.load(k_pages_ptr + places[:, None] + d[None, :], mask=inside, other=0.0)
        v = tl.load(v_pages_ptr + places[:, None] + d[None, :], mask=inside, other=0.0)
        score = dot(q, tl.trans(k), PRECISION) * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        highest = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp(score - highest[:, None])
        before = tl.exp(largest - highest)
        total = total * before + tl.sum(weight, axis=1)
        acc = acc * before[:, None] + dot(weight.to(v.dtype), v, PRECISION)
        largest = highest
    some = total > 0.0
    lse = tl.where(some, largest + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    acc = acc / tl.where(some, total, 1.0)[:, None]
    part = (n * tl.num_programs(1) * GROUP + h) * SPLITS + split
    tl.store(part_ptr + part[:, None] * WIDTH + d[None, :], acc, mask=in_tile & some[:, None])
    tl.store(part_lse_ptr + part, lse, mask=in_rows)


@triton.jit
def paged_join_kernel(
    part_ptr, part_lse_ptr, o_ptr, lse_ptr, H,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """Join the runs of one head of one document; 0 and -inf where none has keys."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    split = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    first = (n * H + h) * SPLITS
    lse = tl.load(part_lse_ptr + first + split, mask=split < SPLITS, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp(lse - safe)
    total = tl.sum(weight, axis=0)
    some = total > 0.0
    # A run without keys is not read: that of a short document is most of them.
    inside = ((split < SPLITS) & (weight > 0.0))[:, None] & (d < WIDTH)[None, :]
    part = tl.load(part_ptr + (first + split)[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
    o = tl.sum(part * weight[:, None], axis=0) / tl.where(some, total, 1.0)
    tl.store(o_ptr + (n * H + h) * WIDTH + d, o.to(o_ptr.dtype.element_ty), mask=d < WIDTH)
    tl.store(lse_ptr + n * H + h, tl.where(some, largest + tl.log(tl.where(some, total, 1.0)), float("-inf")))
