"""The definitions of softmax attention, of packed rows and of one block. They are the oracle of every backend.

Legend: T tokens (queries), S keys, H heads, G key/value heads, R = H / G, D head width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def naive_softmax_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document, and its log-sum-exp, ``(o_THD, lse_HT)`` in float64."""
    q, k, v = q_THD.double(), k_TGD.double(), v_TGD.double()
    parts = [naive_softmax_block(q[lo:hi], k[lo:hi], v[lo:hi], True, scale) for lo, hi in pairwise(cu_seqlens.tolist())]
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def naive_softmax_block(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of one block, differentiable by plain autograd; head h reads key/value head ``h // R``."""
    repeat = q_THD.shape[1] // k_SGD.shape[1]
    k_SHD, v_SHD = (x.repeat_interleave(repeat, dim=1) for x in (k_SGD, v_SGD))
    score_HTS = torch.einsum("thd,shd->hts", q_THD, k_SHD) * scale
    if causal:
        later_TS = torch.ones(score_HTS.shape[1:], dtype=torch.bool, device=q_THD.device).triu(1)
        score_HTS = score_HTS.masked_fill(later_TS, -torch.inf)
    lse_HT = score_HTS.logsumexp(-1)
    return torch.einsum("hts,shd->thd", torch.exp(score_HTS - lse_HT[..., None]), v_SHD), lse_HT
