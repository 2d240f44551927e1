"""Document lengths rounded up to few, because cuDNN plans a graph anew for each length it meets.

A causal document may be read past its end: no query of its own sees what follows. Backward, a log-sum-exp of infinity
makes every probability of the rows past the end 0, so that they add nothing to any gradient. So a longer view of the
packed row stands in for the document, and nothing is copied but at the end of the row, where tokens have to be added.

Legend: T tokens of the row, L tokens of the document, R tokens of its bucket, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 32
"""Buckets between a power of two and the next: at most 1/32 of the tokens are added, and of the time 1/16."""


def bucket(length: int) -> int:
    """The length that stands in for this one; multiples of 64 at least."""
    step = max(64, (1 << (length - 1).bit_length()) // (2 * STEPS)) if length > 1 else 64
    return -(-length // step) * step


def view_or_pad(x_THD: Tensor, start: int, rows: int) -> Tensor:
    """``rows`` tokens from ``start`` on: a view, or with zeros added where the row ends before."""
    missing = start + rows - x_THD.shape[0]
    return x_THD[start : start + rows] if missing <= 0 else F.pad(x_THD[start:], (0, 0, 0, 0, 0, missing))


def lse_past_end(lse_HT: Tensor, start: int, length: int, rows: int) -> Tensor:
    """Log-sum-exp [H, R] of the document, infinity past its end."""
    lse_HR = torch.full((lse_HT.shape[0], rows), torch.inf, dtype=lse_HT.dtype, device=lse_HT.device)
    lse_HR[:, :length] = lse_HT[:, start : start + length]
    return lse_HR
