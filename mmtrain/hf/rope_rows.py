"""Partial RoPE written so that a program which rotates whole heads computes the same.

MiniMax-01 rotates the first R of a head's K dimensions, in pairs (j, j + R/2), and leaves the others alone. Ports that
rotate whole heads pair (j, j + K/2). Reordering the rows of W_q and of W_k in the same way within each head changes no
product q . k, so the pairs can be moved to where such a port looks for them; its other pairs get a frequency of nearly
zero: a rotation by an angle below 1e-20 is the identity in any float type. The configuration says the frequencies by
RoPE type "longrope", which divides each of them by a factor of its own.

Legend: K head dimension, R rotated dimensions, H heads, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STILL = 1e30  # divides the frequency of a pair that is not to be rotated


def row_order(heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """Return which row of ours each row of a reordered W_q or W_k is; int64 [H K]."""
    half, rest = rotary_dim // 2, head_dim // 2 - rotary_dim // 2
    first = [*range(half), *range(rotary_dim, rotary_dim + rest)]
    second = [*range(half, rotary_dim), *range(rotary_dim + rest, head_dim)]
    order_K = torch.tensor(first + second)
    return (torch.arange(heads)[:, None] * head_dim + order_K).flatten()


def rope_parameters(head_dim: int, rotary_dim: int, base: float, longest: int) -> dict[str, Any]:
    """Return transformers' `rope_parameters` for reordered rows.

    Frequency j of a rotation of K dimensions is base^(-2j/K) over factor j, and is to be base^(-2j/R).

    Args:
        head_dim: K; even.
        rotary_dim: R.
        base: of our RoPE.
        longest: length up to which the first list of factors holds; both are the same.
    """
    factors = [
        base ** (2 * j / rotary_dim) / base ** (2 * j / head_dim) if j < rotary_dim // 2 else STILL
        for j in range(head_dim // 2)
    ]
    return {
        "rope_type": "longrope", "rope_theta": base, "short_factor": factors, "long_factor": factors,
        "attention_factor": 1.0, "factor": 1.0, "original_max_position_embeddings": longest,
    }  # fmt: skip
