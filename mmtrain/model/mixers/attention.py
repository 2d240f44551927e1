"""The attention call: the one place where a mixer meets a kernel.

The mixers hold an :class:`AttentionCall`; context parallelism replaces it by one that talks to other ranks. Nothing
crosses a document boundary in either kind.

Legend: T tokens, H heads, G key/value heads, K head dimension, X = 3 K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mmkernels.lightning import silu_lightning_attention
from mmkernels.softmax import Piece, softmax_attention, softmax_pieces
from mmtrain.model.packed_seq import Packing


class AttentionCall(Protocol):
    """The kernels that mixers ask for, one method a kind of attention."""

    def begin_lightning(self, qkv_THX: Tensor, slopes_H: Tensor, packing: Packing) -> Callable[[], Tensor]:
        """Begin decayed linear attention of q, k, v = SiLU(qkv), and return what ends it with the result, [T, H, K].

        What does not need the result is to be computed in between: it hides what other ranks send.
        A head's 3 K columns of qkv are K of q, K of k, K of v; slopes are fp32.
        """

    def softmax(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> Tensor:
        """Return causal softmax attention with scale 1/sqrt(K), [T, H, K]."""


class LocalAttention:
    """Both kinds of attention over tokens that all lie on this device."""

    def begin_lightning(self, qkv_THX: Tensor, slopes_H: Tensor, packing: Packing) -> Callable[[], Tensor]:
        """Run the fused lightning kernels; nothing is left to be ended."""
        o_THK = silu_lightning_attention(qkv_THX[None], slopes_H, cu_seqlens=packing.cu_seqlens).squeeze(0)
        return lambda: o_THK

    def softmax(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> Tensor:
        """Return the output of the softmax kernels, [T, H, K]."""
        pieces = packing.planned(_softmax_pieces, q_THK.dtype, *q_THK.shape[1:])
        return softmax_attention(q_THK, k_TGK, v_TGK, packing.cu_seqlens, packing.lengths, pieces=pieces)


def _softmax_pieces(packing: Packing, dtype: torch.dtype, heads: int, width: int) -> list[Piece]:
    """The calls that a row's attention is cut into, for so many heads of this type and width."""
    q_THK = packing.cu_seqlens.new_empty(1, 1, width, dtype=dtype).expand(sum(packing.lengths), heads, width)
    return softmax_pieces(q_THK, packing.cu_seqlens, packing.lengths)
