"""Triton kernels of routing. README.md tells how they fit together.

Nothing here uses atomics, so a route is the same every time. NaN logits are numbers like others (the greatest):
the experts chosen are always K different ones, and every index derives from them.

Legend: T tokens, E experts, K experts a token, A = T * K assignments (a = t * K + k), B token blocks, R rows.
`EP` and `KP` are E and K rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

TAKEN = tl.constexpr(-(2**31))
"""Key of an expert that is chosen already or does not exist; below the key of every float."""
NAN_KEY = tl.constexpr(2**31 - 1)
NAN_PRIORITY = tl.constexpr(2**30 - 1)
"""Above the bits of 1.0: priorities are probabilities, so that their bits fit in 30."""


@triton.jit
def _sortable(value) -> tl.tensor:
    """Int32 that sorts as fp32 does, with -0 equal to 0 and NaN greatest."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(value != value, NAN_KEY, bits ^ ((bits >> 31) & NAN_KEY))


@triton.jit(do_not_specialize=["T", "B"])
def route_choose_kernel(
    logits_ptr,
    weight_ptr,
    expert_ptr,
    priority_ptr,
    rank_ptr,
    block_count_ptr,
    T,
    B,
    E: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PROBS: tl.constexpr,
) -> None:
    """Choose each token's experts and weights; count each expert's assignments in the block.

    Grid: B blocks of BLOCK_T tokens. Writes weight_TK, expert_TK, priority_TK (sortable int32 of 30 bits; 0 unless
    PROBS), rank_TK (earlier assignments to the same expert in the block) and block_count_EB.
    """
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, EP)
    inside = (t < T)[:, None] & (e < E)[None, :]
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    logit = tl.load(logits_ptr + at, mask=inside, other=0.0)
    key = tl.where((e < E)[None, :], _sortable(logit), TAKEN)
    order = tl.full([BLOCK_T, EP], K, tl.int32)  # K: not chosen
    for k in range(K):
        best = tl.max(key, axis=1)
        first = tl.min(tl.where(key == best[:, None], e[None, :], EP), axis=1)
        hit = e[None, :] == first[:, None]
        order = tl.where(hit, k, order)
        key = tl.where(hit, TAKEN, key)

    chosen = order < K
    # The first choice is the greatest logit; a NaN or infinity in it reaches the weights, as in torch's softmax.
    top = tl.sum(tl.where(order == 0, logit, 0.0), axis=1)
    exp = tl.exp(logit - top[:, None])
    weight = exp / tl.sum(tl.where(chosen, exp, 0.0), axis=1)[:, None]
    priority = weight
    if K == 1:
        # One chosen expert always weighs 1, which ranks nothing: then the full distribution does.
        priority = exp / tl.sum(tl.where((e < E)[None, :], exp, 0.0), axis=1)[:, None]
    bits = tl.zeros([BLOCK_T, EP], tl.int32)
    if PROBS:
        bits = tl.where(priority != priority, NAN_PRIORITY, priority.to(tl.int32, bitcast=True))

    write = chosen & inside
    count = write.to(tl.int32)
    at_TK = t[:, None] * K + order
    tl.store(weight_ptr + at_TK, weight, mask=write)
    tl.store(expert_ptr + at_TK, tl.broadcast_to(e[None, :], (BLOCK_T, EP)), mask=write)
    tl.store(priority_ptr + at_TK, bits, mask=write)
    tl.store(rank_ptr + at_TK, tl.cumsum(count, axis=0) - count, mask=write)
    tl.store(block_count_ptr + e * B + block, tl.sum(count, axis=0), mask=e < E)


@triton.jit(do_not_specialize=["B"])
def route_scan_kernel(block_count_ptr, assigned_ptr, B, BLOCK_B: tl.constexpr) -> None:
    """Turn block_count_EB into the assignments of earlier blocks, in at_list; their total is assigned_E. Grid: E."""
    expert = tl.program_id(0)
    total = 0
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        at = block_count_ptr + expert * B + b
        count = tl.load(at, mask=b < B, other=0)
        tl.store(at, total + tl.cumsum(count, axis=0) - count, mask=b < B)
        total += tl.sum(count, axis=0)
    tl.store(assigned_ptr + expert, total)


@triton.jit(do_not_specialize=["A", "B"])
def route_list_kernel(
    expert_ptr,
    priority_ptr,
    rank_ptr,
    before_ptr,
    assigned_ptr,
    list_priority_ptr,
    list_assignment_ptr,
    A,
    B,
    E: tl.constexpr,
    EP: tl.constexpr,
    ASSIGNMENTS_PER_BLOCK: tl.constexpr,
    BLOCK_A: tl.constexpr,
) -> None:
    """Sort assignments by expert, then by position: list_priority_A and list_assignment_A.

    Grid: blocks of BLOCK_A assignments. `before_ptr` is the scanned block_count_EB of `route_choose_kernel`, whose
    blocks held ASSIGNMENTS_PER_BLOCK assignments.
    """
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    inside = a < A
    e = tl.arange(0, EP)
    assigned = tl.load(assigned_ptr + e, mask=e < E, other=0)
    expert = tl.load(expert_ptr + a, mask=inside, other=0)
    start = tl.sum(tl.where(e[None, :] < expert[:, None], assigned[None, :], 0), axis=1)
    before = tl.load(before_ptr + expert * B + a // ASSIGNMENTS_PER_BLOCK, mask=inside, other=0)
    at_list = start + before + tl.load(rank_ptr + a, mask=inside, other=0)
    tl.store(list_priority_ptr + at_list, tl.load(priority_ptr + a, mask=inside, other=0), mask=inside)
    tl.store(list_assignment_ptr + at_list, a, mask=inside)


@triton.jit(do_not_specialize=["T"])
def route_weight_grad_kernel(
    dweight_ptr,
    weight_ptr,
    expert_ptr,
    dlogits_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Gradient of the softmax over chosen logits, w_k (dw_k - sum_j w_j dw_j), zero elsewhere; all of [T, E].

    Grid: blocks of BLOCK_T tokens.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k_KP = tl.arange(0, EP), tl.arange(0, KP)
    at_TK = t[:, None] * K + k_KP[None, :]
    inside_TK = (t < T)[:, None] & (k_KP < K)[None, :]
    product = tl.load(weight_ptr + at_TK, mask=inside_TK, other=0.0)
    product *= tl.load(dweight_ptr + at_TK, mask=inside_TK, other=0.0)
    mean = tl.sum(product, axis=1)
    grad = tl.zeros([BLOCK_T, EP], tl.float32)
    for k in range(K):
        expert = tl.load(expert_ptr + t * K + k, mask=t < T, other=-1)
        weight = tl.load(weight_ptr + t * K + k, mask=t < T, other=0.0)
        dweight = tl.load(dweight_ptr + t * K + k, mask=t < T, other=0.0)
        grad = tl.where(e[None, :] == expert[:, None], (weight * (dweight - mean))[:, None], grad)
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(dlogits_ptr + at, grad, mask=(t < T)[:, None] & (e < E)[None, :])
