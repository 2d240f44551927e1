"""States of lightning layers under context parallelism: every rank has those of all documents, the same to the bit.

Where ranks share a row, the state that enters a rank's first document is the decayed sum of the slot's and of what
earlier ranks' tokens of it leave (LASP+: MiniMax-01 section 3.2.2, with the decay and the documents that the paper
leaves out). The state after a document comes from the rank that has its last token.

Legend: S tokens of this rank, H heads, K head dimension, X = 3 K, N documents, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.lightning import lightning_attention, lightning_segment_states
from mmtrain.infer.context.batch import ContextBatch
from mmtrain.infer.context.exchange import gather_alike, join
from mmtrain.infer.context.group import ContextParallel
from mmtrain.model.mixers.lightning_slots import LightningBatch, LightningSlots


class ContextSlots:
    """The slots of a lightning layer on one of the ranks.

    Attributes:
        local: its slots; all ranks' hold the same.
    """

    takes_padding = False  # no step with collectives has been recorded as a CUDA graph

    def __init__(self, local: LightningSlots, context: ContextParallel) -> None:
        self.local, self._context = local, context

    def begin(self, slot: int) -> None:
        """Set a slot to zero."""
        self.local.begin(slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a state."""
        self.local.copy_slot(source, target)

    def copy_page(self, source: int, target: int) -> None:
        """Do nothing: no page has anything of this layer."""

    def view(self, batch: ContextBatch) -> LightningBatch | SharedStates:
        """Return the states of these documents."""
        if not batch.shared:
            return LightningBatch(self.local.states_SHKK, batch.row)
        return SharedStates(self.local.states_SHKK, batch, self._context)


@dataclass(frozen=True)
class SharedStates:
    """States of the documents of a row that ranks share; the first dimension of `states` is slots."""

    states: Tensor
    batch: ContextBatch
    context: ContextParallel

    def attend(self, qkv_SHX: Tensor, slopes_H: Tensor) -> Tensor:
        """Return the attention of this rank's tokens, [S, H, K]; slots of all ranks get the states after the row."""
        cut = self.batch.cut
        q, k, v = F.silu(qkv_SHX)[None].chunk(3, dim=-1)
        slots_N, pieces = self.batch.row.slots_N, self.batch.pieces
        first = pieces[0].document
        before = self.states.index_select(0, slots_N[first : first + len(pieces)])
        cu_seqlens = self.batch.packing.cu_seqlens
        if cut.crosses:
            left_1HKK = lightning_segment_states(k, v, slopes_H, cu_seqlens=cu_seqlens, check_values=False)[0]
            left_RHKK = gather_alike(left_1HKK, self.context.group)[:, 0]
            before[0] = self._entering(before[0], left_RHKK, slopes_H)
        o_1SHK, after = lightning_attention(
            q, k, v, slopes_H, cu_seqlens=cu_seqlens, initial_state=before, output_final_state=True, check_values=False
        )
        final_NHKK = self.states.new_zeros(len(slots_N), *self.states.shape[1:])
        ended = sum(piece.stop == cut.starts[piece.document + 1] for piece in pieces)  # all but perhaps the last
        final_NHKK[first : first + ended] = after[:ended]
        self.states.index_copy_(0, slots_N, join(final_NHKK, self.context.group))
        return o_1SHK[0]

    def _entering(self, slot_HKK: Tensor, left_RHKK: Tensor, slopes_H: Tensor) -> Tensor:
        """The state before this rank's first token, from that before the row and what each rank's last document left.

        Each is decayed by exp(-s) for every token in between.
        """
        earlier = self.batch.cut.earlier(self.batch.part)
        if not earlier:
            return slot_HKK
        decay_PH = torch.exp(-slopes_H.double() * self.batch.distances_P1).to(slot_HKK.dtype)
        parts_PHKK = torch.cat([slot_HKK[None], left_RHKK[earlier.start : earlier.stop]])
        return (parts_PHKK * decay_PH[..., None, None]).sum(0)
