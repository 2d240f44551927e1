"""One block of attention in plain torch: float32 inside (float64 for float64 inputs), a few queries at a time.

The path of what no fused kernel takes. Legend: T queries, S keys, H heads, G key/value heads, R = H / G, D head width,
L = R * t rows of the t queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_SCORES = 2**26
"""Scores that exist at a time."""


def forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of q, and log-sum-exp [H, T]."""
    k_GSD, v_GSD = _by_group(k_SGD), _by_group(v_SGD)
    o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    lse_HT = torch.empty(q_THD.shape[1], q_THD.shape[0], dtype=k_GSD.dtype, device=q_THD.device)
    for rows, keys in _chunks(q_THD, k_SGD, causal):
        score_GLS = _scores(q_THD[rows], k_GSD[:, keys], rows.start, causal, scale)
        lse_GL1 = score_GLS.logsumexp(-1, keepdim=True)
        o_THD[rows] = _by_token(score_GLS.sub_(lse_GL1).exp_() @ v_GSD[:, keys], o_THD[rows])
        lse_HT[:, rows] = lse_GL1.view(q_THD.shape[1], -1)
    return o_THD, lse_HT


def backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv in the dtypes of the inputs; the probabilities are ``exp(score - lse)`` with the lse given."""
    k_GSD, v_GSD = _by_group(k_SGD), _by_group(v_SGD)
    dq_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    dk_GSD, dv_GSD = torch.zeros_like(k_GSD), torch.zeros_like(v_GSD)
    groups = k_SGD.shape[1]
    for rows, keys in _chunks(q_THD, k_SGD, causal):
        q_GLD, do_GLD, o_GLD = (_by_group(x[rows], groups) for x in (q_THD, do_THD, o_THD))
        score_GLS = _scores(q_THD[rows], k_GSD[:, keys], rows.start, causal, scale)
        prob_GLS = score_GLS.sub_(lse_HT[:, rows].reshape(groups, -1, 1)).exp_()
        dv_GSD[:, keys] += prob_GLS.mT @ do_GLD
        dprob_GLS = do_GLD @ v_GSD[:, keys].mT
        dscore_GLS = dprob_GLS.sub_((do_GLD * o_GLD).sum(-1, keepdim=True)).mul_(prob_GLS).mul_(scale)
        dq_THD[rows] = _by_token(dscore_GLS @ k_GSD[:, keys], dq_THD[rows])
        dk_GSD[:, keys] += dscore_GLS.mT @ q_GLD
    return dq_THD, dk_GSD.transpose(0, 1).to(k_SGD.dtype), dv_GSD.transpose(0, 1).to(v_SGD.dtype)


def _chunks(q_THD: Tensor, k_SGD: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Queries of each chunk, and the keys that they may see."""
    tokens, keys = q_THD.shape[0], k_SGD.shape[0]
    size = max(1, MAX_SCORES // max(1, q_THD.shape[1] * keys))
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        yield slice(start, stop), slice(0, stop if causal else keys)


def _scores(q_tHD: Tensor, k_GSD: Tensor, start: int, causal: bool, scale: float) -> Tensor:
    """Scaled scores [G, L, S]; with ``causal``, -inf where the key comes after the query, whose first is ``start``."""
    score_GLS = (_by_group(q_tHD, k_GSD.shape[0]) @ k_GSD.mT).mul_(scale)
    if causal:
        tokens, keys = q_tHD.shape[0], k_GSD.shape[1]
        later_tS = torch.ones(tokens, keys, dtype=torch.bool, device=q_tHD.device).triu_(start + 1)
        score_GLS.view(-1, tokens, keys).masked_fill_(later_tS, -torch.inf)
    return score_GLS


def _by_group(x_tHD: Tensor, groups: int | None = None) -> Tensor:
    """[t, H, D] as [G, R * t, D] in float32 or wider: the heads that share keys become rows of one product."""
    x_tHD = x_tHD.to(torch.promote_types(x_tHD.dtype, torch.float32))
    return x_tHD.transpose(0, 1).reshape(groups or x_tHD.shape[1], -1, x_tHD.shape[2])


def _by_token(x_GLD: Tensor, like_tHD: Tensor) -> Tensor:
    """[G, R * t, D] as [t, H, D]."""
    tokens, heads, width = like_tHD.shape
    return x_GLD.reshape(heads, tokens, width).transpose(0, 1)
