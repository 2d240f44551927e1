"""Where documents start and end: what the Triton kernels read about packing.

Shape letters: T tokens, C tokens of a chunk, N chunks of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.lightning.tiling import ceil_div


@triton.jit
def _bounds_kernel(cu_ptr, bounds_ptr, marks_ptr, tokens, documents, steps, C: tl.constexpr, REVERSE: tl.constexpr):
    """One chunk of the walk: bounds of its tokens, and a word with a bit for each position that starts a document."""
    chunk = tl.program_id(0)
    position = chunk * C + tl.arange(0, C)
    ok = position < tokens
    token = tl.where(ok, position, tokens - 1)
    if REVERSE:
        token = tokens - 1 - token
    # Binary search for the last offset that is not past the token: documents of length 0 are stepped over.
    low = tl.zeros([C], tl.int32)
    high = tl.zeros([C], tl.int32) + documents
    for _ in range(0, steps):
        middle = (low + high) // 2
        at_or_before = tl.load(cu_ptr + middle) <= token
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    # Offsets are not read on the host: wrong ones must not send a kernel out of its row.
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + low).to(tl.int32), 0), token)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + low + 1).to(tl.int32), token + 1), tokens)
    if REVERSE:
        opens = end == token + 1
    else:
        opens = start == token
        tl.store(bounds_ptr + token, start, mask=ok)
        tl.store(bounds_ptr + tokens + token, end, mask=ok)
    bits = tl.where(opens & ok, tl.full([C], 1, tl.int64) << tl.arange(0, C).to(tl.int64), 0)
    tl.store(marks_ptr + chunk, tl.sum(bits, axis=0))


def document_bounds(cu_seqlens: Tensor, tokens: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Bounds and marks of a packed row, by two small kernels, without a host wait.

    Args:
        cu_seqlens: int32 or int64 offsets of the documents.
        tokens: length T of the row, at least 1.
        chunk: tokens C of a chunk, at most 64.

    Returns:
        ``(bounds_2T, marks_2N)``: start (inclusive) and end (exclusive) of each token's document, int32; and for each
        chunk of a forward and of a reversed walk, int64 whose bit j says that a document starts at its position j.
    """
    chunks = ceil_div(tokens, chunk)
    bounds_2T = torch.empty(2, tokens, dtype=torch.int32, device=cu_seqlens.device)
    marks_2N = torch.empty(2, chunks, dtype=torch.int64, device=cu_seqlens.device)
    documents = cu_seqlens.shape[0] - 1
    for reverse in (False, True):
        _bounds_kernel[(chunks,)](
            cu_seqlens.contiguous(), bounds_2T, marks_2N[int(reverse)], tokens, documents, documents.bit_length(),
            C=chunk, REVERSE=reverse, num_warps=2,
        )  # fmt: skip
    return bounds_2T, marks_2N
