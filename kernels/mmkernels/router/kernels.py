"""Triton kernels of the router: the logits' product and its gradients, statistics of the softmax and their gradient.

Tensor cores add to their accumulator by cutting bits off, so that an error would grow with the length of a sum. Every
product here covers one block, starts at zero, and is added to what came before in plain fp32.

Legend: T and N tokens, D model width, E experts, S splits of the tokens, B blocks of them, F = E + 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.common.triton_support import INTERPRETED

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, acc):
    """``acc + a @ b`` of bfloat16."""
    if _INTERPRETED:  # numpy has no bfloat16: the interpreter would multiply the bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc)
    else:
        return tl.dot(a, b, acc=acc)


@triton.jit
def _product(x, exact):
    """``x @ exact`` for an fp32 right side, each term to fp32 precision.

    An fp32 number is the sum of three bfloat16 ones, 8 bits each, and their products with a bfloat16 x are exact. Other
    x (float16 is exact in tf32, too) make three tf32 products, which leave out 2^-22 of a term or less.
    """
    if x.dtype == tl.bfloat16:
        high = exact.to(tl.bfloat16)
        rest = exact - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        small = _dot(x, low, tl.zeros([x.shape[0], exact.shape[1]], tl.float32))
        return _dot(x, high, _dot(x, middle, small))
    else:
        return tl.dot(x.to(tl.float32), exact, input_precision="tf32x3")


@triton.jit(do_not_specialize=["T"])
def router_logits_kernel(
    x_ptr,
    weight_ptr,
    logits_ptr,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write logits_TE = x_TD @ weight_ED^T. Grid: ceil(T / BLOCK_T) * ceil(E / BLOCK_E)."""
    BLOCKS_E: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    t = (tl.program_id(0) // BLOCKS_E * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    e = tl.program_id(0) % BLOCKS_E * BLOCK_E + tl.arange(0, BLOCK_E)
    # Past the end, the last row once more: no load needs a mask for rows, and their logits are not stored.
    x_row = x_ptr + tl.minimum(t, T - 1)[:, None] * D
    weight_row = weight_ptr + tl.minimum(e, E - 1)[:, None] * D
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        if D % BLOCK_D == 0:
            x = tl.load(x_row + d)
            weight = tl.load(weight_row + d)
        else:
            x = tl.load(x_row + d, mask=d < D, other=0.0)
            weight = tl.load(weight_row + d, mask=d < D, other=0.0)
        logits += _product(x, tl.trans(weight))
    tl.store(logits_ptr + t[:, None] * E + e[None, :], logits, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def router_input_grad_kernel(
    dlogits_ptr,
    weight_ptr,
    dx_ptr,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Write dx_TD = dlogits_TE @ weight_ED, rounded once. Grid: ceil(T / BLOCK_T) * ceil(D / BLOCK_D)."""
    BLOCKS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = (tl.program_id(0) // BLOCKS_D * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = tl.program_id(0) % BLOCKS_D * BLOCK_D + tl.arange(0, BLOCK_D)
    dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        at = tl.minimum(t, T - 1)[:, None] * E + e[None, :]
        dlogits = tl.load(dlogits_ptr + at, mask=(e < E)[None, :], other=0.0)
        inside = (e < E)[:, None] & (d < D)[None, :]
        weight = tl.load(weight_ptr + e[:, None] * D + d[None, :], mask=inside, other=0.0)
        dx += _product(dlogits, weight)
    tl.store(
        dx_ptr + t[:, None] * D + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :]
    )


@triton.jit(do_not_specialize=["T", "TOKENS"])
def router_weight_grad_kernel(
    dlogits_ptr,
    x_ptr,
    part_ptr,
    T,
    TOKENS,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write part_SED, dlogits^T @ x over TOKENS tokens each. Grid: S * ceil(E / BLOCK_E) * ceil(D / BLOCK_D)."""
    BLOCKS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    BLOCKS_E: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0)
    split = (program // (BLOCKS_D * BLOCKS_E)).to(tl.int64)
    d = program % BLOCKS_D * BLOCK_D + tl.arange(0, BLOCK_D)
    e = program // BLOCKS_D % BLOCKS_E * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for first in tl.range(0, TOKENS, BLOCK_T, num_stages=STAGES):
        t = split * TOKENS + first + tl.arange(0, BLOCK_T)
        inside = (t < T)[:, None] & (e < E)[None, :]
        dlogits = tl.load(dlogits_ptr + t[:, None] * E + e[None, :], mask=inside, other=0.0)
        inside = (t < T)[:, None]
        if D % BLOCK_D:
            inside &= (d < D)[None, :]
        x = tl.load(x_ptr + t[:, None] * D + d[None, :], mask=inside, other=0.0)
        part += _product(tl.trans(x), dlogits)
    at = (split * E + e[None, :]) * D + d[:, None]
    tl.store(part_ptr + at, part, mask=(d < D)[:, None] & (e < E)[None, :])


@triton.jit
def _softmax(logits_ptr, t, e, N, E: tl.constexpr):
    """Probabilities and their logarithms [BLOCK_N, EP]; both 0 for experts past the end."""
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    logit = tl.load(logits_ptr + at, mask=(t < N)[:, None] & (e < E)[None, :], other=0.0)
    logit = tl.where((e < E)[None, :], logit, float("-inf"))
    shifted = logit - tl.max(logit, axis=1)[:, None]
    exp = tl.exp(shifted)
    total = tl.sum(exp, axis=1)[:, None]
    return exp / total, tl.where((e < E)[None, :], shifted - tl.log(total), 0.0)


@triton.jit(do_not_specialize=["N", "inv_tokens"])
def router_balance_kernel(
    logits_ptr,
    part_ptr,
    N,
    inv_tokens,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write part_BF: this block's share of the mean probabilities and, in column E of E + 1, of the mean entropy.

    Grid: ceil(N / BLOCK_N). EP is E rounded up to a power of two.
    """
    block = tl.program_id(0)
    t, e = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, EP)
    prob, log_prob = _softmax(logits_ptr, t, e, N, E)
    inside = (t < N)[:, None] & (e < E)[None, :]
    mean = tl.sum(tl.where(inside, prob, 0.0), axis=0) * inv_tokens
    entropy = tl.sum(tl.sum(tl.where(inside, prob * log_prob, 0.0), axis=1), axis=0) * -inv_tokens
    tl.store(part_ptr + block * (E + 1) + e, mean, mask=e < E)
    tl.store(part_ptr + block * (E + 1) + E, entropy)


@triton.jit(do_not_specialize=["N", "inv_tokens"])
def router_balance_grad_kernel(
    logits_ptr,
    dmean_ptr,
    dlogits_ptr,
    N,
    inv_tokens,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write dlogits = p (dmean - sum of p dmean) / N. Grid and EP as above."""
    t, e = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, EP)
    prob, _ = _softmax(logits_ptr, t, e, N, E)
    dmean = tl.load(dmean_ptr + e, mask=e < E, other=0.0)[None, :]
    dlogits = prob * (dmean - tl.sum(prob * dmean, axis=1)[:, None]) * inv_tokens
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(dlogits_ptr + at, dlogits, mask=(t < N)[:, None] & (e < E)[None, :])
