"""Softmax attention across ranks in one call, for short chunks, where many small blocks would leave a GPU idle.

All tails that this rank needs come at once, of all heads, one message from each rank. Then the keys of each piece of
queries are laid one after another, copies included, and one call without a join does everything (`varlen_plan.py`).
Backward, the gradients of a tail's copies are summed, go home by the mirrored messages, and are added there: this
rank's own part, then the other ranks' in their order, in float32, rounded once.

Legend: S tokens here, H heads, G key/value heads, K head width, B keys of all pieces, W tails of the pieces here, P
tokens here whose gradients pieces anywhere have as tails.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.softmax import softmax_suffix_backward, softmax_suffix_forward
from mmtrain.parallel.context.flights import Flight
from mmtrain.parallel.context.softmax_parts import Grads, wide
from mmtrain.parallel.context.tail_plan import TailPlan
from mmtrain.parallel.context.varlen_plan import VarlenPlan

KEPT = 4
"""Keys are kept for the backward if they take less than this part of the budget (1 / 4); else they come again."""


def forward(
    q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, varlen: VarlenPlan, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [S, H, K] and log-sum-exp [H, S] over all keys, and the keys and values of all pieces [B, 2, G, K]."""
    kv_B2GK = bring(k_SGK, v_SGK, varlen, group)
    return *softmax_suffix_forward(q_SHK, kv_B2GK[:, 0], kv_B2GK[:, 1], varlen.documents), kv_B2GK


def backward(
    do_SHK: Tensor, q_SHK: Tensor, kv_B2GK: Tensor, o_SHK: Tensor, lse_HS: Tensor, varlen: VarlenPlan, plan: TailPlan,
    group: ProcessGroup,
) -> Grads:  # fmt: skip
    """dq, dk and dv."""
    dq_SHK, *dkv = softmax_suffix_backward(do_SHK, q_SHK, kv_B2GK[:, 0], kv_B2GK[:, 1], o_SHK, lse_HS, varlen.documents)
    shape, number = kv_B2GK.shape[1:], wide(kv_B2GK.dtype)
    # Where no rank has two copies of a tail there is nothing to sum before the way home, and nothing to round.
    found_W2GK = dq_SHK.new_empty(
        varlen.kept_tails + varlen.send_index.shape[0], *shape, dtype=kv_B2GK.dtype if plan.single else number
    )  # the W tails, then what comes back for this rank's
    for which, dx_BGK in enumerate(dkv):
        varlen.copies.write(found_W2GK[: varlen.kept_tails, which], dx_BGK)
    returned = found_W2GK[varlen.kept_tails :]
    flight = Flight(
        [(found_W2GK[rows], rank) for rank, rows in varlen.receives],
        [(returned[rows], rank) for rank, rows in varlen.sends],
        group,
    )
    grads = [dx_BGK.index_select(0, varlen.own_S) for dx_BGK in dkv]
    flight.wait()
    if varlen.shared_P.shape[0]:
        sum_P2GK = dq_SHK.new_empty(varlen.shared_P.shape[0], *shape, dtype=number)
        varlen.owners.write(sum_P2GK, found_W2GK[varlen.received :])
        for which, dx_SGK in enumerate(grads):
            total_PGK = sum_P2GK[:, which].add_(dx_SGK.index_select(0, varlen.shared_P))
            dx_SGK.index_copy_(0, varlen.shared_P, total_PGK.to(dx_SGK.dtype))
    return dq_SHK, *grads


def bring(k_SGK: Tensor, v_SGK: Tensor, varlen: VarlenPlan, group: ProcessGroup) -> Tensor:
    """Keys and values of all pieces, [B, 2, G, K]."""
    tokens = k_SGK.shape[0]
    source_2GK = k_SGK.new_empty(tokens + varlen.received, 2, *k_SGK.shape[1:])  # tokens here, then received tails
    torch.stack([k_SGK.detach(), v_SGK.detach()], dim=1, out=source_2GK[:tokens])
    sent_2GK, received_2GK = source_2GK.index_select(0, varlen.send_index), source_2GK[tokens:]
    Flight(
        [(sent_2GK[rows], rank) for rank, rows in varlen.sends],
        [(received_2GK[rows], rank) for rank, rows in varlen.receives],
        group,
    ).wait()
    return source_2GK.index_select(0, varlen.source_B)


def buffer_bytes(plan: TailPlan, kv_heads: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of all buffers in backward on the rank that has most, without the workspace of the kernel.

    Keys and their gradients, copies included; gradients of tails that leave and come back, with what they are copied
    from; sums of those here, likewise.
    """
    keys, tails = 2 * plan.most_keys + plan.most_received, plan.most_received + plan.most_returned
    sums, number = 2 * plan.most_shared, wide(dtype)
    sizes = keys * dtype.itemsize + tails * (dtype if plan.single else number).itemsize + sums * number.itemsize
    return 2 * kv_heads * width * sizes


def keeps(plan: TailPlan, kv_heads: int, width: int, dtype: torch.dtype, budget: int) -> bool:
    """Whether keys are kept for the backward: the same on all ranks."""
    return 2 * plan.most_keys * kv_heads * width * dtype.itemsize <= budget // KEPT
