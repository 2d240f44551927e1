"""Where each token's document starts and ends: what the Triton kernels read about packing.

Shape letters: T tokens, N documents.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _bounds_kernel(cu_ptr, bounds_ptr, tokens, documents, steps, BLOCK: tl.constexpr):
    """Binary search for the last offset that is not past the token: documents of length 0 are stepped over."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = token < tokens
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + documents
    for _ in range(0, steps):
        middle = (low + high) // 2
        at_or_before = tl.load(cu_ptr + middle) <= token
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    # Offsets that lie (a wrong cu_seqlens is not read on the host) must not send a kernel out of its row.
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + low).to(tl.int32), 0), token)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + low + 1).to(tl.int32), token + 1), tokens)
    tl.store(bounds_ptr + token, start, mask=ok)
    tl.store(bounds_ptr + tokens + token, end, mask=ok)


def document_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Start (inclusive) and end (exclusive) of each token's document, int32 [2, T]; one small kernel, no host wait.

    Args:
        cu_seqlens: int32 or int64 offsets [N+1].
        tokens: length T of the row.
    """
    bounds_2T = torch.empty(2, tokens, dtype=torch.int32, device=cu_seqlens.device)
    documents = cu_seqlens.shape[0] - 1
    if tokens:
        grid = (triton.cdiv(tokens, BLOCK),)
        steps = documents.bit_length()
        _bounds_kernel[grid](cu_seqlens.contiguous(), bounds_2T, tokens, documents, steps, BLOCK=BLOCK)
    return bounds_2T
