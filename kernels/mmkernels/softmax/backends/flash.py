"""Documents of a packed row, one after the other, in one call of the FlashAttention-2 that torch brings along.

`torch.nn.attention.varlen.varlen_attn` is the same kernel with an autograd of its own; here one backward serves
documents of every kind. Legend: T tokens or queries, S keys, H heads, G key/value heads, D
head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, cu_seqlens: Tensor, longest: int, scale: float,
    cu_keys: Tensor | None = None, longest_keys: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [T, H, D] in the dtype of q, and log-sum-exp [H, T], float32; ``cu_seqlens`` is int32.

    With offsets of keys of their own, a document's queries are its last tokens: the mask is aligned bottom right.
    """
    if cu_keys is None:
        cu_keys, longest_keys = cu_seqlens, longest
    run = torch.ops.aten._flash_attention_forward.default
    o_THD, lse_HT, *_ = run(
        q_THD, k_SGD, v_SGD, cu_seqlens, cu_keys, longest, longest_keys, 0.0, True, False, scale=scale
    )
    return o_THD, lse_HT


def backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, cu_seqlens: Tensor,
    longest: int, scale: float, cu_keys: Tensor | None = None, longest_keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; offsets as for :func:`forward`."""
    if cu_keys is None:
        cu_keys, longest_keys = cu_seqlens, longest
    run = torch.ops.aten._flash_attention_backward.default
    # The state of a dropout that there is none of.
    state, unused = (torch.empty(n, dtype=torch.uint64, device=q_THD.device) for n in (2, 0))
    return run(
        do_THD.contiguous(), q_THD, k_SGD, v_SGD, o_THD, lse_HT.contiguous(), cu_seqlens, cu_keys, longest,
        longest_keys, 0.0, True, state, unused, scale=scale,
    )  # fmt: skip


def full_forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One block in which every query sees every key: output [T, H, D] and log-sum-exp [H, T], float32."""
    run = torch.ops.aten._flash_attention_forward.default
    queries, keys = q_THD.shape[0], k_SGD.shape[0]
    o_THD, lse_HT, *_ = run(
        q_THD, k_SGD, v_SGD, _offsets(q_THD), _offsets(k_SGD), queries, keys, 0.0, False, False, scale=scale
    )
    return o_THD, lse_HT


def full_backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of one block in which every query sees every key, with the lse given."""
    run = torch.ops.aten._flash_attention_backward.default
    state, unused = (torch.empty(n, dtype=torch.uint64, device=q_THD.device) for n in (2, 0))
    return run(
        do_THD.contiguous(), q_THD, k_SGD, v_SGD, o_THD.contiguous(), lse_HT.contiguous(), _offsets(q_THD),
        _offsets(k_SGD), q_THD.shape[0], k_SGD.shape[0], 0.0, False, state, unused, scale=scale,
    )  # fmt: skip


def _offsets(x_THD: Tensor) -> Tensor:
    """Those of one document, made on the device."""
    return torch.arange(0, x_THD.shape[0] + 1, x_THD.shape[0], dtype=torch.int32, device=x_THD.device)
