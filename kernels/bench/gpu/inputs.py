"""Tensors that are like the model's, and document lengths of packed rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 128
FLATTEST = 0.0127
"""Layer factor of the last lightning layer of the released model."""


def normal(device: torch.device, *shape: int) -> Tensor:
    """Normal bfloat16 values."""
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def slopes_of(heads: int, factor: float, device: torch.device) -> Tensor:
    """2^(-8h/H) for h = 1..H, times the factor of a layer (MiniMax-01, released code)."""
    h = torch.arange(1, heads + 1, device=device, dtype=torch.float32)
    return torch.exp2(-8.0 * h / heads) * factor


@dataclass(frozen=True)
class Attention:
    """Inputs of lightning attention, after SiLU as in the model, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    slopes: Tensor

    @classmethod
    def draw(cls, device: torch.device, batch: int, tokens: int, heads: int, factor: float = 1.0) -> Attention:
        """The same values for the same shape."""
        torch.manual_seed(0)
        q, k, v = (F.silu(normal(device, batch, tokens, heads, WIDTH)).requires_grad_() for _ in range(3))
        return cls(q, k, v, normal(device, batch, tokens, heads, WIDTH), slopes_of(heads, factor, device))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gets a gradient."""
        return self.q, self.k, self.v

    @property
    def unit(self) -> int:
        """Bytes of one tensor."""
        return self.q.nbytes

    @property
    def shape(self) -> str:
        """For the table."""
        batch, tokens, heads, width = self.q.shape
        return f"B={batch} T={tokens} H={heads} D={width}" if batch > 1 else f"T={tokens} H={heads} D={width}"


def documents(total: int, low: int, high: int, seed: int = 0) -> list[int]:
    """Lengths drawn evenly from ``low`` to ``high``, the last cut so that their sum is ``total``."""
    generator, lengths, left = np.random.default_rng(seed), [], total
    while left > 0:
        lengths.append(min(int(generator.integers(low, high + 1)), left))
        left -= lengths[-1]
    return lengths


def offsets(lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """``cu_seqlens`` of documents of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=dtype)
