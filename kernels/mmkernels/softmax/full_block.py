"""Blocks in which every query sees every key, of any size, shared between cuDNN and FlashAttention-2.

cuDNN is up to twice as fast, but plans a graph for each pair of sizes that it meets (35 to 55 ms of the host), and here
it cannot read past the end, as for causal documents: further keys would be seen. So cuDNN gets a round number of
queries and keys, of which there are few, and FlashAttention-2, which takes any, the rest of both.

Legend: T queries, S keys, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.softmax import merge
from mmkernels.softmax.backends import cudnn, flash

STEPS = 4
"""Round numbers between a power of two and the next. 1/10 of the queries, and of the keys, are over on average."""
LEAST = 1024
"""Queries and keys that cuDNN has to get at least."""


def round_part(length: int, allowed: bool) -> int:
    """The queries or keys of these that go to cuDNN, if it is allowed; 0 if they are too few."""
    step = max(1, (1 << (length.bit_length() - 1)) // STEPS) if length else 1
    found = length // step * step
    return found if allowed and found >= LEAST else 0


def forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, dense: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of q, and log-sum-exp [H, T], float32; `dense` says whether cuDNN takes these."""
    queries, keys = round_part(q_THD.shape[0], dense), round_part(k_SGD.shape[0], dense)
    if not queries or not keys:
        return flash.full_forward(q_THD, k_SGD, v_SGD, scale)
    o_THD, lse_HT = cudnn.forward(q_THD[:queries], k_SGD[:keys], v_SGD[:keys], False, scale)
    if keys < k_SGD.shape[0]:
        _merge(o_THD, lse_HT, *flash.full_forward(q_THD[:queries], k_SGD[keys:], v_SGD[keys:], scale))
    if queries == q_THD.shape[0]:
        return o_THD, lse_HT
    o_rest, lse_rest = flash.full_forward(q_THD[queries:], k_SGD, v_SGD, scale)
    return torch.cat([o_THD, o_rest]), torch.cat([lse_HT, lse_rest], dim=1)


def backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, dense: bool,
    scale: float, any_size: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; the probabilities are ``exp(score - lse)`` with the lse given. `any_size` takes what is over."""
    any_size = any_size or flash.full_backward
    queries, keys = round_part(q_THD.shape[0], dense), round_part(k_SGD.shape[0], dense)
    if not queries or not keys:
        return any_size(do_THD, q_THD, k_SGD, v_SGD, o_THD, lse_HT, scale)
    do, q, o, lse = do_THD[:queries], q_THD[:queries], o_THD[:queries], lse_HT[:, :queries]
    dq, dk, dv = cudnn.backward(do, q, k_SGD[:keys], v_SGD[:keys], o, lse, False, scale)
    if keys < k_SGD.shape[0]:
        dq_rest, dk_rest, dv_rest = any_size(do, q, k_SGD[keys:], v_SGD[keys:], o, lse, scale)
        dq, dk, dv = dq + dq_rest, torch.cat([dk, dk_rest]), torch.cat([dv, dv_rest])
    if queries < q_THD.shape[0]:
        do, q, o, lse = do_THD[queries:], q_THD[queries:], o_THD[queries:], lse_HT[:, queries:]
        dq_rest, dk_rest, dv_rest = any_size(do, q, k_SGD, v_SGD, o, lse, scale)
        dq, dk, dv = torch.cat([dq, dq_rest]), dk + dk_rest, dv + dv_rest
    return dq, dk, dv


def _merge(o_THD: Tensor, lse_HT: Tensor, part_THD: Tensor, part_lse_HT: Tensor) -> None:
    run = merge.merge
    if o_THD.is_cuda:
        from mmkernels.softmax.merge_launch import merge as run  # Triton does not exist wherever torch does
    run(o_THD, lse_HT, part_THD, part_lse_HT)
