"""States that enter chunks of a row, from what every chunk leaves: one kernel that walks the row for all heads at once.

Shape letters: M chunks of the row, N wanted ones, H heads, D width of q and k, E width of v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.common.triton_support import check_device
from mmkernels.lightning.chunk_plan import ChunkPlan
from mmkernels.lightning.triton.autograd import on_device
from mmkernels.lightning.triton.tiling import ceil_div, power_of_two

MOST_NUMBERS = 1024
"""Numbers of a state that a program holds: 64 heads of 128 are 1024 programs, about 8 for each multiprocessor."""


@triton.jit
def states_between_kernel(
    states, slopes_ptr, steps, out, num_steps, chunk_tokens, H, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Walk the ``steps``, [num_steps + 1, 3] as `chunk_plan.Step`, up to the last one.

    Program = (head, BLOCK numbers of its state). Where a chunk decays a state below 2^-30, only what the nearest chunk
    leaves can be seen in it, and nothing else is read.
    """
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    head, number = pid // PARTS, pid % PARTS * BLOCK + tl.arange(0, BLOCK)
    stride = tl.cast(H, tl.int64) * SIZE  # from one state to the next
    at = tl.cast(head, tl.int64) * SIZE + number
    decay = tl.exp(-tl.load(slopes_ptr + head).to(tl.float64) * chunk_tokens).to(tl.float32)
    decay = tl.where(decay < 9.3e-10, 0.0, decay)
    entering = tl.zeros([BLOCK], tl.float32)
    wanted = tl.load(steps)
    for n in range(0, num_steps):
        if wanted >= 0:
            tl.store(out + wanted * stride + at, entering, mask=number < SIZE)
        place, keeps = tl.load(steps + 3 * n + 1), tl.load(steps + 3 * n + 2)
        wanted = tl.load(steps + 3 * n + 3)
        size = tl.where((place >= 0) & ((wanted >= 0) | (decay > 0)), SIZE, 0)
        own = tl.load(states + tl.maximum(place, 0) * stride + at, mask=number < size, other=0.0)
        entering = own + tl.where(keeps > 0, decay * entering, 0.0)


def triton_states_between(states_MHDE: Tensor, slopes_H: Tensor, plan: ChunkPlan, reverse: bool) -> Tensor:
    """The Triton backend of ``states_between``: fp32 [N, H, D, E].

    Raises:
        KernelArgumentError: states on a CPU, or in float64.
    """
    check_device("states_MHDE", states_MHDE)
    if states_MHDE.dtype != torch.float32:
        raise KernelArgumentError("states_MHDE", f"dtype {states_MHDE.dtype}", "float32 for backend triton")
    _, heads, d, e = states_MHDE.shape
    out_NHDE = torch.empty(plan.num_wanted, heads, d, e, dtype=torch.float32, device=states_MHDE.device)
    steps = len(plan.steps[int(reverse)])
    if not steps:
        return out_NHDE
    block = min(MOST_NUMBERS, power_of_two(d * e))
    with on_device(states_MHDE):
        states_between_kernel[(heads * ceil_div(d * e, block),)](
            states_MHDE.contiguous(), slopes_H, plan.steps_2L3[int(reverse)], out_NHDE, steps, plan.chunk_tokens, heads,
            SIZE=d * e, BLOCK=block,
        )  # fmt: skip
    return out_NHDE
