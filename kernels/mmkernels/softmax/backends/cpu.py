"""One block of attention through torch's fused CPU kernel, which takes fewer key/value heads as they are.

`F.scaled_dot_product_attention` runs the same kernel, but copies keys and values to every head, and keeps the
log-sum-exp to itself. Legend: T queries, S keys, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of q, and log-sum-exp [H, T]."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    o_BHTD, lse_BHT = run(*(x.transpose(0, 1)[None] for x in (q_THD, k_SGD, v_SGD)), 0.0, causal, scale=scale)
    return o_BHTD[0].transpose(0, 1), lse_BHT[0]


def backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; the probabilities are ``exp(score - lse)`` with the lse given."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    do, q, k, v, o = (x.transpose(0, 1)[None] for x in (do_THD, q_THD, k_SGD, v_SGD, o_THD))
    dq, dk, dv = (x[0].transpose(0, 1) for x in run(do, q, k, v, o, lse_HT[None], 0.0, causal, scale=scale))
    return dq, dk, dv
