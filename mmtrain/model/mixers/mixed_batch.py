"""A row of decode steps and of short pieces of prompts behind them, padded to sizes that a graph was recorded for.

What the weights are read for once is computed once: projections, feed-forwards and experts take the whole row. Mixers
take its two halves apart as far as they must.

Legend: D documents that get a token, T tokens of pieces, R = D + T rows, N pieces, M pages of a document at most; all
with their padding. H heads, G key/value heads, K head dimension, X = 3 K, P pages, L tokens of a page, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.lightning import lightning_attention, lightning_decode_step
from mmkernels.softmax import softmax_paged_step
from mmtrain.model.packed_seq import Packing


@dataclass(frozen=True)
class MixedBatch:
    """The documents of such a row, of which the host knows the sizes alone: nothing is read from the device.

    Places without a piece, the tokens of which are padding, do what the first piece does with the memory: they read its
    state, and write what it writes where it writes. So nothing else is touched.

    Attributes:
        slots_D: int64, the slot of each document that gets a token; -1 for a place without one.
        cu_pieces: int32 [N + 1], offsets of the pieces among the T tokens, from 0 to T.
        slots_N: int64, the slot of each piece.
        from_N: int64, the place whose state each place writes: its own, or 0.
        keys_R: int64, the keys that each row's token sees, its own with them; 0 for padding.
        table_RM: int64, the pages of each row's document.
        write_T: int64, place of each piece's token in the pages laid end to end.
        from_T: int64, the token whose keys are written there: itself, or 0.
    """

    slots_D: Tensor
    cu_pieces: Tensor
    slots_N: Tensor
    from_N: Tensor
    keys_R: Tensor
    table_RM: Tensor
    write_T: Tensor
    from_T: Tensor

    @property
    def decodes(self) -> int:
        """D."""
        return len(self.slots_D)

    @cached_property
    def packing(self) -> Packing:
        """The row as documents, each token with its true position."""
        first_D = torch.arange(self.decodes, dtype=torch.int32, device=self.cu_pieces.device)
        rows = len(self.keys_R)
        cu_seqlens = torch.cat([first_D, self.decodes + self.cu_pieces])
        return Packing(cu_seqlens, (self.keys_R - 1).clamp(min=0), rows, (rows,))


@dataclass(frozen=True)
class LightningMixed:
    """States of the documents of a mixed row."""

    states_SHKK: Tensor
    batch: MixedBatch

    def attend(self, qkv_RHX: Tensor, slopes_H: Tensor) -> Tensor:
        """Return the attention of new tokens, [R, H, K]; the slots get the states after them."""
        batch, decodes = self.batch, self.batch.decodes
        q_RHK, k_RHK, v_RHK = F.silu(qkv_RHX).chunk(3, dim=-1)
        ones = (x_RHK[:decodes] for x_RHK in (q_RHK, k_RHK, v_RHK))
        o_DHK = lightning_decode_step(*ones, slopes_H, self.states_SHKK, inplace=True, slots_B=batch.slots_D)[0]
        pieces = (x_RHK[None, decodes:] for x_RHK in (q_RHK, k_RHK, v_RHK))
        o_1THK, state_NHKK = lightning_attention(
            *pieces, slopes_H, cu_seqlens=batch.cu_pieces, output_final_state=True, check_values=False,
            initial_state=self.states_SHKK.index_select(0, batch.slots_N),
        )  # fmt: skip
        self.states_SHKK.index_copy_(0, batch.slots_N, state_NHKK.index_select(0, batch.from_N))
        return torch.cat([o_DHK, o_1THK[0]])


@dataclass(frozen=True)
class SoftmaxMixed:
    """Keys and values of the documents of a mixed row; both tensors are those of all pages."""

    k_PLGK: Tensor
    v_PLGK: Tensor
    batch: MixedBatch

    def attend(self, q_RHK: Tensor, k_RGK: Tensor, v_RGK: Tensor) -> Tensor:
        """Add new keys and values to the pages; return each document's causal attention over all of it, [R, H, K].

        A piece's tokens are decoded side by side, as documents that share pages: each reads all keys before it, for
        which pieces must be short. Their keys are there before the first is read; the step writes the same once more.
        """
        batch, pieces = self.batch, slice(self.batch.decodes, None)
        for pages_PLGK, new_RGK in ((self.k_PLGK, k_RGK), (self.v_PLGK, v_RGK)):
            pages_PLGK.flatten(0, 1).index_copy_(0, batch.write_T, new_RGK[pieces].index_select(0, batch.from_T))
        places = batch.table_RM, batch.keys_R
        return softmax_paged_step(q_RHK, k_RGK, v_RGK, self.k_PLGK, self.v_PLGK, *places)[0]
