"""The attention call: the one place where a mixer meets a kernel.

The mixers hold an :class:`AttentionCall`; context parallelism replaces it by one that talks to other ranks, and kernels
are chosen here by device. Nothing crosses a document boundary in either kind.

Legend: T tokens, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import lightning_attention
from mmtrain.model.packing import Packing


class AttentionCall(Protocol):
    """What a mixer asks for."""

    def lightning(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, slopes_H: Tensor, packing: Packing) -> Tensor:
        """Decayed linear attention, [T, H, K]."""

    def softmax(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> Tensor:
        """Causal softmax attention with scale 1/sqrt(K), [T, H, K]."""


class LocalAttention:
    """Both kinds of attention over tokens that all lie on this device."""

    def lightning(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, slopes_H: Tensor, packing: Packing) -> Tensor:
        """See :class:`AttentionCall`."""
        o, _ = lightning_attention(q_THK[None], k_THK[None], v_THK[None], slopes_H, cu_seqlens=packing.cu_seqlens)
        return o[0]

    def softmax(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> Tensor:
        """See :class:`AttentionCall`."""
        if q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16):
            return _varlen_softmax(q_THK, k_TGK, v_TGK, packing)
        return _softmax_by_document(q_THK, k_TGK, v_TGK, packing)


def causal_softmax(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
    """Softmax attention of one document through SDPA; queries are its last tokens where they are fewer than keys."""
    queries, keys = q_THK.shape[0], k_TGK.shape[0]
    mask = None
    if 1 < queries < keys:  # SDPA's own causal mask aligns the first query with the first key
        offset = keys - queries
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_THK.device).tril(offset)
    q, k, v = (t.transpose(0, 1)[None] for t in (q_THK, k_TGK, v_TGK))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and queries > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o[0].transpose(0, 1)


def _softmax_by_document(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> Tensor:
    bounds = packing.cu_seqlens.tolist()
    pieces = [
        causal_softmax(q_THK[start:stop], k_TGK[start:stop], v_TGK[start:stop])
        for start, stop in itertools.pairwise(bounds)
        if stop > start
    ]
    return torch.cat(pieces) if pieces else torch.empty_like(q_THK)


def _varlen_softmax(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only; its import is not free

    repeat = q_THK.shape[1] // k_TGK.shape[1]
    k, v = (t.repeat_interleave(repeat, dim=1) if repeat > 1 else t for t in (k_TGK, v_TGK))
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    q, k, v = q_THK.contiguous(), k.contiguous(), v.contiguous()
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))  # this window is the causal one
