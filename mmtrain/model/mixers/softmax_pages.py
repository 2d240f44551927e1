"""Keys and values that softmax layers keep of many documents, in pages that documents share out among themselves.

Legend: T new tokens and S tokens of all documents, H heads, G key/value heads, K head dimension, P pages, L tokens of a
page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.softmax import softmax_paged_step, softmax_suffix_forward
from mmtrain.config import ModelConfig
from mmtrain.model.mixers.batch_cache import CacheShape, DocumentBatch
from mmtrain.model.mixers.mixed_batch import MixedBatch, SoftmaxMixed


class SoftmaxPages:
    """Keys and values of a softmax layer, in the dtype of the weights.

    Attributes:
        k_PLGK: rotated keys.
        v_PLGK: values.
    """

    takes_padding = True

    def __init__(self, config: ModelConfig, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        sizes = shape.pages, shape.page_tokens, config.num_kv_heads, config.head_dim
        self.k_PLGK, self.v_PLGK = (torch.empty(sizes, dtype=dtype, device=device) for _ in range(2))

    def begin(self, slot: int) -> None:
        """Do nothing: no slot has anything of this layer."""

    def copy_slot(self, source: int, target: int) -> None:
        """Do nothing, likewise."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page's keys and values."""
        self.k_PLGK[target].copy_(self.k_PLGK[source])
        self.v_PLGK[target].copy_(self.v_PLGK[source])

    def view(self, batch: DocumentBatch | MixedBatch) -> SoftmaxBatch | SoftmaxMixed:
        """Return the keys and values of these documents."""
        view = SoftmaxMixed if isinstance(batch, MixedBatch) else SoftmaxBatch
        return view(self.k_PLGK, self.v_PLGK, batch)


@dataclass(frozen=True)
class SoftmaxBatch:
    """Keys and values of the documents of one pass; both tensors are those of all pages."""

    k_PLGK: Tensor
    v_PLGK: Tensor
    batch: DocumentBatch

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """Add new keys and values to the pages; return each document's causal attention over all of it, [T, H, K].

        Single tokens read the pages where they lie; for longer pieces a part's keys are laid out as one tensor.
        """
        if self.batch.single:
            places = self.batch.table_NP, self.batch.keys_N
            return softmax_paged_step(q_THK, k_TGK, v_TGK, self.k_PLGK, self.v_PLGK, *places)[0]
        k_AGK, v_AGK = self.k_PLGK.flatten(0, 1), self.v_PLGK.flatten(0, 1)
        k_AGK.index_copy_(0, self.batch.write_T, k_TGK)
        v_AGK.index_copy_(0, self.batch.write_T, v_TGK)
        parts = []
        for rows, part in self.batch.parts:
            k_SGK, v_SGK = (x_AGK.index_select(0, part.read_S) for x_AGK in (k_AGK, v_AGK))
            parts.append(softmax_suffix_forward(q_THK[rows], k_SGK, v_SGK, part.suffixes)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)
