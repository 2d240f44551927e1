"""One block of attention through cuDNN, on views of the packed row.

torch caches a cuDNN graph by the shapes and strides of q, k and v alone, and builds the strides of everything else into
it. So those must follow from q's: tokens outermost in all, and a contiguous log-sum-exp.

Legend: T queries, S keys, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of q, and log-sum-exp [H, T], float32."""
    run = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SGD, v_SGD))
    o_BHTD, lse_BHT1, *_ = run(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return o_BHTD[0].transpose(0, 1), lse_BHT1[0, :, :, 0]


def backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; the probabilities are ``exp(score - lse)`` with the lse given."""
    run = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    do, q, k, v, o = (x.transpose(0, 1)[None] for x in (do_THD.contiguous(), q_THD, k_SGD, v_SGD, o_THD.contiguous()))
    lse_BHT1 = lse_HT.contiguous()[None, :, :, None]
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that there is none of
    grads = run(
        do, q, k, v, o, lse_BHT1, seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )
    dq, dk, dv = (x[0].transpose(0, 1) for x in grads)
    return dq, dk, dv
