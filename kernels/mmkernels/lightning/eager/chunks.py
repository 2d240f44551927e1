"""Chunks of a row with a state each, in torch: one pass of the row's own code for every chunk.

Shape letters: T tokens, H heads, D width of q and k, E width of v, N chunks here, M chunks of the
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mmkernels.lightning.checks import state_dtype
from mmkernels.lightning.chunk_plan import ChunkPlan
from mmkernels.lightning.eager.autograd import backward_pass, forward_pass
from mmkernels.lightning.eager.documents import document_ids
from mmkernels.lightning.eager.plan import Plan, make_plan


def eager_chunks_forward(
    q_1THD: Tensor, k_1THD: Tensor, v_1THE: Tensor, slopes_H: Tensor, cu_seqlens: Tensor, initial_NHDE: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and the states of each chunk's segments; see ``chunks_forward``."""
    o_1THE = torch.empty(v_1THE.shape, dtype=q_1THD.dtype, device=q_1THD.device)
    saved, count = [], initial_NHDE.shape[0]
    ids_T, plan = document_ids(cu_seqlens, q_1THD.shape[1]), _plan(q_1THD, v_1THE, count)
    with torch.autocast(q_1THD.device.type, enabled=False):
        for n, part in _parts(q_1THD.shape[1], count):
            o, states = forward_pass(
                q_1THD[:, part], k_1THD[:, part], v_1THE[:, part], slopes_H, ids_T[part], initial_NHDE[n : n + 1], plan,
                False,
            )  # fmt: skip
            o_1THE[:, part] = o
            saved.append(states)
    return o_1THE, tuple(saved)


def eager_chunks_backward(
    q_1THD: Tensor, k_1THD: Tensor, v_1THE: Tensor, do_1THE: Tensor, slopes_H: Tensor, cu_seqlens: Tensor,
    initial_NHDE: Tensor, final_gradient: Callable[[], Tensor], saved: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor, Tensor], raw: tuple[Tensor, Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Write dq, dk and dv; see ``chunks_backward``."""
    ids_T, plan = document_ids(cu_seqlens, q_1THD.shape[1]), _plan(q_1THD, v_1THE, initial_NHDE.shape[0])
    final_NHDE = final_gradient()
    with torch.autocast(q_1THD.device.type, enabled=False):
        for n, part in _parts(q_1THD.shape[1], initial_NHDE.shape[0]):
            q, k, v, do = (x[:, part] for x in (q_1THD, k_1THD, v_1THE, do_1THE))
            found = backward_pass(
                q, k, v, slopes_H, ids_T[part], saved[n], do, final_NHDE[n : n + 1], plan, False
            )[:3]  # fmt: skip
            for i, grad in enumerate(found):
                if raw is not None:
                    grad = torch.ops.aten.silu_backward(grad, raw[i][:, part].contiguous())
                grads[i][:, part] = grad


def eager_states_between(states_MHDE: Tensor, slopes_H: Tensor, plan: ChunkPlan, reverse: bool) -> Tensor:
    """States that enter the wanted chunks, one chunk of the row after another; see ``states_between``."""
    decay_H11 = torch.exp(-slopes_H.double() * plan.chunk_tokens).to(states_MHDE.dtype)[:, None, None]
    out_NHDE = states_MHDE.new_zeros(plan.num_wanted, *states_MHDE.shape[1:])
    entering: Tensor | None = None  # state that enters the chunk; None is zero
    for out, place, keeps in plan.steps[int(reverse)]:
        if entering is not None and out >= 0:
            out_NHDE[out] = entering
        if place < 0:
            entering = None
        elif keeps and entering is not None:
            entering = torch.addcmul(states_MHDE[place], entering, decay_H11.expand_as(entering))
        else:
            entering = states_MHDE[place]
    return out_NHDE


def _parts(tokens: int, count: int) -> Iterator[tuple[int, slice]]:
    size = tokens // count
    return ((n, slice(n * size, (n + 1) * size)) for n in range(count))


def _plan(q_1THD: Tensor, v_1THE: Tensor, count: int) -> Plan:
    _, tokens, heads, d = q_1THD.shape
    return make_plan(1, tokens // count, heads, max(d, v_1THE.shape[3]), state_dtype(q_1THD.dtype).itemsize)
