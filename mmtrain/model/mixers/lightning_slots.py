"""States that lightning layers keep of many documents, one slot a document.

Legend: T tokens, N documents, S slots, H heads, K head dimension, X = 3 K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.lightning import lightning_attention, lightning_decode_step
from mmtrain.config import ModelConfig
from mmtrain.model.mixers.batch_cache import CacheShape, DocumentBatch
from mmtrain.model.mixers.mixed_batch import LightningMixed, MixedBatch


class LightningSlots:
    """The recurrent states of a lightning layer.

    Attributes:
        states_SHKK: fp32 (float64 for a float64 model), whatever the weights' type: a state sums over a whole document.
    """

    takes_padding = True

    def __init__(self, config: ModelConfig, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        sizes = shape.slots, config.num_heads, config.head_dim, config.head_dim
        self.states_SHKK = torch.empty(sizes, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def begin(self, slot: int) -> None:
        """Set a slot to the state before the first token, which is zero."""
        self.states_SHKK[slot].zero_()

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a state."""
        self.states_SHKK[target].copy_(self.states_SHKK[source])

    def copy_page(self, source: int, target: int) -> None:
        """Do nothing: no page has anything of this layer."""

    def view(self, batch: DocumentBatch | MixedBatch) -> LightningBatch | LightningMixed:
        """Return the states of these documents."""
        view = LightningMixed if isinstance(batch, MixedBatch) else LightningBatch
        return view(self.states_SHKK, batch)


@dataclass(frozen=True)
class LightningBatch:
    """States of the documents of one pass."""

    states_SHKK: Tensor
    batch: DocumentBatch

    def attend(self, qkv_THX: Tensor, slopes_H: Tensor) -> Tensor:
        """Return the attention of new tokens, [T, H, K]; the slots get the states after them.

        Single tokens go through the decode step, longer pieces through the kernels of training, each document from its
        own state. A document alone is a row: that is cut into segments, which fill a GPU where its heads do not.
        """
        slots_N = self.batch.slots_N
        if self.batch.single:  # each state is read and written where it lies
            given = *qkv_THX.chunk(3, dim=-1), slopes_H, self.states_SHKK
            return lightning_decode_step(*given, inplace=True, slots_B=slots_N, silu=True)[0]
        q_THK, k_THK, v_THK = F.silu(qkv_THX).chunk(3, dim=-1)
        cu_seqlens = None if len(self.batch.queries) == 1 else self.batch.packing.cu_seqlens
        o_1THK, state_NHKK = lightning_attention(
            q_THK[None], k_THK[None], v_THK[None], slopes_H, cu_seqlens=cu_seqlens,
            initial_state=self.states_SHKK.index_select(0, slots_N), output_final_state=True, check_values=False,
        )  # fmt: skip
        self.states_SHKK.index_copy_(0, slots_N, state_NHKK)
        return o_1THK[0]
