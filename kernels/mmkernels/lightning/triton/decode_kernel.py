"""The decode step in one Triton kernel: the state is read once and written once, and nothing else is of its size.

Shape letters: B sequences, H heads, D width of q and k, E width of v; in the kernel K and V for D and E, as in FLA. A
program owns a K x BV tile of one head's state: all of K, because the output sums over it; `BK` is K rounded up to a
power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.lightning.device.tile import silu

BLOCK_V = 32
"""Columns of a tile: 128 bytes of each row of the state, 8 lanes with 16 bytes each."""
ELEMENTS_PER_THREAD = 32
"""Elements of a tile that a thread holds."""


@triton.jit
def lightning_decode_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, slots_ptr, h0, ht, o_ptr, H,
    q_stride_b, q_stride_h, q_stride_k, k_stride_b, k_stride_h, k_stride_k, v_stride_b, v_stride_h, v_stride_v,
    slopes_stride, h0_stride_b, h0_stride_h, h0_stride_k, h0_stride_v,
    ht_stride_b, ht_stride_h, ht_stride_k, ht_stride_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLOTS: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Write the state ht = exp(-s) h0 + k^T v and the output o = q ht: o is contiguous, ht may be h0 itself.

    With SLOTS the state of sequence b is `slots_ptr[b]`; where that is negative there is none, and o is 0. With SILU
    that of q, k and v is taken first.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    row = tl.program_id(0) // tiles
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    in_k = o_k < K
    in_v = o_v < V
    in_tile = in_k[:, None] & in_v[None, :]
    slot = b
    if SLOTS:
        slot = tl.load(slots_ptr + b).to(tl.int64)
        if slot < 0:
            tl.store(o_ptr + row.to(tl.int64) * V + o_v, tl.zeros([BV], o_ptr.dtype.element_ty), mask=in_v)
            return
    # Scalars go to the pointer first: then it is plain that 16 bytes along V lie together, and accesses are that wide.
    h0 += slot * h0_stride_b + h * h0_stride_h
    ht += slot * ht_stride_b + h * ht_stride_h
    offsets_in_h0 = o_k[:, None] * h0_stride_k + o_v[None, :] * h0_stride_v
    if BK == K and V % BV == 0:
        state = tl.load(h0 + offsets_in_h0)
    else:
        state = tl.load(h0 + offsets_in_h0, mask=in_tile, other=0.0)
    q = tl.load(q_ptr + b * q_stride_b + h * q_stride_h + o_k * q_stride_k, mask=in_k, other=0.0)
    k = tl.load(k_ptr + b * k_stride_b + h * k_stride_h + o_k * k_stride_k, mask=in_k, other=0.0)
    v = tl.load(v_ptr + b * v_stride_b + h * v_stride_h + o_v * v_stride_v, mask=in_v, other=0.0)
    if SILU:
        q, k, v = silu(q), silu(k), silu(v)
    q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    # The float32 exponential of a GPU is off by more than a rounding, step after step in the same direction.
    decay = tl.exp(-tl.load(slopes_ptr + h * slopes_stride).to(tl.float64)).to(tl.float32)
    new = state * decay + k[:, None] * v[None, :]
    o = tl.sum(q[:, None] * new, axis=0)
    offsets_in_ht = o_k[:, None] * ht_stride_k + o_v[None, :] * ht_stride_v
    if BK == K and V % BV == 0:
        tl.store(ht + offsets_in_ht, new)
    else:
        tl.store(ht + offsets_in_ht, new, mask=in_tile)
    tl.store(o_ptr + row.to(tl.int64) * V + o_v, o.to(o_ptr.dtype.element_ty), mask=in_v)


def triton_decode_step(
    q_BHD: Tensor, k_BHD: Tensor, v_BHE: Tensor, slopes_H: Tensor, state_BHDE: Tensor, new_BHDE: Tensor,
    slots_B: Tensor | None = None, silu: bool = False,
) -> Tensor:  # fmt: skip
    """Write the next state to ``new_BHDE``, which may be ``state_BHDE``, and return o_BHE in the input dtype.

    With ``slots_B`` both hold states at places of their own, and ``silu`` activates the inputs, as
    :func:`~mmkernels.lightning.lightning_decode_step` says. Arguments are checked; inputs are float32, bfloat16 or
    float16, states float32, strides any.
    """
    (sequences, heads, depth), width = q_BHD.shape, v_BHE.shape[-1]
    o_BHE = torch.empty(sequences, heads, width, dtype=q_BHD.dtype, device=q_BHD.device)
    block_k, block_v = triton.next_power_of_2(depth), min(BLOCK_V, triton.next_power_of_2(width))
    grid = (sequences * heads * triton.cdiv(width, block_v),)
    if grid[0]:
        with torch.cuda.device_of(q_BHD):
            lightning_decode_kernel[grid](
                q_BHD, k_BHD, v_BHE, slopes_H, slots_B, state_BHDE, new_BHDE, o_BHE, heads,
                *q_BHD.stride(), *k_BHD.stride(), *v_BHE.stride(), *slopes_H.stride(),
                *state_BHDE.stride(), *new_BHDE.stride(),
                K=depth, V=width, BK=block_k, BV=block_v, SLOTS=slots_B is not None, SILU=silu,
                num_warps=max(1, min(16, block_k * block_v // (32 * ELEMENTS_PER_THREAD))),
            )  # fmt: skip
    return o_BHE
