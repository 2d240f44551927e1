"""cuDNN's graphs, built before they are needed.

Torch builds one for each shape that it meets, forward and backward, and keeps it. On an H200's host that takes 35 and
55 ms, nearly as long as the attention of 32K tokens with 64 heads, and the GPU is idle. In a run over many ranks nearly
every step would wait for some rank that meets a length for the first time.

Legend: T tokens, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch.utils.checkpoint import checkpoint

from mmkernels.softmax import dispatch
from mmkernels.softmax.api import softmax_attention
from mmkernels.softmax.backends.cudnn_buckets import bucket

LONGEST = 32768
"""Longer documents take longer themselves than their graphs, which are left to be built when they come."""


def lengths_to_plan(longest: int) -> list[int]:
    """Every length that stands in for a document of up to `longest` tokens, where cuDNN takes it; longest first."""
    return sorted({bucket(length) for length in range(dispatch.LONG, min(longest, LONGEST) + 1)}, reverse=True)


def build_plans(
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    *,
    recompute: bool = False,
    known: Container[int] = (),
) -> list[int]:
    """Attend to one document of each length that :func:`softmax_attention` tells apart, forward and backward.

    Torch keeps graphs for each thread: those of backward are built in autograd's. Results are thrown away.

    Args:
        heads: H of the queries [T, H, D] to come, contiguous, as keys and values [T, G, D] have to be.
        kv_heads: G.
        width: D.
        dtype: of all of them.
        device: where they will be.
        longest: tokens of the longest document to come; graphs are built up to ``LONGEST``.
        recompute: build those of forward in autograd's thread too, for models that compute it again in backward.
        known: lengths whose graphs this process has already.

    Returns:
        The lengths that were built; none where cuDNN takes none of them, as on Hopper, where our kernels take all.
    """
    probe = torch.empty(1, heads, width, dtype=dtype, device=device)
    if dispatch.hopper_fits(probe) or not dispatch.cudnn_fits(probe):
        return []
    lengths = [length for length in lengths_to_plan(longest) if length not in known]
    with torch.enable_grad():
        for length in lengths:
            q, k, v = (
                torch.zeros(length, n, width, dtype=dtype, device=device, requires_grad=True)
                for n in (heads, kv_heads, kv_heads)
            )
            offsets = torch.tensor([0, length], dtype=torch.int32, device=device)
            if recompute:
                o = checkpoint(softmax_attention, q, k, v, offsets, (length,), use_reentrant=False)
            else:
                o = softmax_attention(q, k, v, offsets, (length,))
            torch.autograd.grad(o, (q, k, v), torch.zeros_like(o))
    return lengths
