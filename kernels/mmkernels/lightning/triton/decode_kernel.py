"""The decode step in one Triton kernel: the state is read once and written once, and nothing else is of its size.

Legend: B sequences, H heads, D width of q and k, E width of v. A program owns a D x BLOCK_E tile of one head's state:
all of D, because the output sums over it; `BLOCK_D` is D rounded up to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_E = 32
"""Columns of a tile: 128 bytes of each row of the state, 8 lanes with 16 bytes each."""
ELEMENTS_PER_THREAD = 32


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, state_ptr, new_ptr, o_ptr, heads,
    q_stride_b, q_stride_h, q_stride_d, k_stride_b, k_stride_h, k_stride_d, v_stride_b, v_stride_h, v_stride_e,
    slopes_stride, state_stride_b, state_stride_h, state_stride_d, state_stride_e,
    new_stride_b, new_stride_h, new_stride_d, new_stride_e,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write new = exp(-s) state + k^T v and o = q new: o is contiguous, new may be state itself."""
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    row = tl.program_id(0) // tiles
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(0) % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    in_d = d < D
    in_e = e < E
    in_tile = in_d[:, None] & in_e[None, :]
    # Scalars go to the pointer first: then it is plain that 16 bytes along E lie together, and accesses are that wide.
    state_ptr += b * state_stride_b + h * state_stride_h
    new_ptr += b * new_stride_b + h * new_stride_h
    at_state = d[:, None] * state_stride_d + e[None, :] * state_stride_e
    if BLOCK_D == D and E % BLOCK_E == 0:
        state = tl.load(state_ptr + at_state)
    else:
        state = tl.load(state_ptr + at_state, mask=in_tile, other=0.0)
    q = tl.load(q_ptr + b * q_stride_b + h * q_stride_h + d * q_stride_d, mask=in_d, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + b * k_stride_b + h * k_stride_h + d * k_stride_d, mask=in_d, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * v_stride_b + h * v_stride_h + e * v_stride_e, mask=in_e, other=0.0).to(tl.float32)
    # The float32 exponential of a GPU is off by more than a rounding, step after step in the same direction.
    decay = tl.exp(-tl.load(slopes_ptr + h * slopes_stride).to(tl.float64)).to(tl.float32)
    new = state * decay + k[:, None] * v[None, :]
    o = tl.sum(q[:, None] * new, axis=0)
    at_new = d[:, None] * new_stride_d + e[None, :] * new_stride_e
    if BLOCK_D == D and E % BLOCK_E == 0:
        tl.store(new_ptr + at_new, new)
    else:
        tl.store(new_ptr + at_new, new, mask=in_tile)
    tl.store(o_ptr + row.to(tl.int64) * E + e, o.to(o_ptr.dtype.element_ty), mask=in_e)


def triton_decode_step(
    q_BHD: Tensor, k_BHD: Tensor, v_BHE: Tensor, slopes_H: Tensor, state_BHDE: Tensor, new_BHDE: Tensor
) -> Tensor:
    """Write the next state to ``new_BHDE``, which may be ``state_BHDE``, and return o_BHE in the input dtype.

    Arguments are checked; inputs are float32, bfloat16 or float16, states float32, strides any.
    """
    (sequences, heads, depth), width = q_BHD.shape, v_BHE.shape[-1]
    o_BHE = torch.empty(sequences, heads, width, dtype=q_BHD.dtype, device=q_BHD.device)
    block_d, block_e = triton.next_power_of_2(depth), min(BLOCK_E, triton.next_power_of_2(width))
    grid = (sequences * heads * triton.cdiv(width, block_e),)
    if grid[0]:
        with torch.cuda.device_of(q_BHD):
            decode_kernel[grid](
                q_BHD, k_BHD, v_BHE, slopes_H, state_BHDE, new_BHDE, o_BHE, heads,
                *q_BHD.stride(), *k_BHD.stride(), *v_BHE.stride(), *slopes_H.stride(),
                *state_BHDE.stride(), *new_BHDE.stride(),
                D=depth, E=width, BLOCK_D=block_d, BLOCK_E=block_e,
                num_warps=max(1, min(16, block_d * block_e // (32 * ELEMENTS_PER_THREAD))),
            )  # fmt: skip
    return o_BHE
