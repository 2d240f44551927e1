"""Keys and values of softmax layers, of which every rank keeps those in its own pages.

The new tokens' queries and keys go to all ranks. Each rank attends its own queries to the new keys, and all queries to
the earlier keys that it keeps; the parts of one query are joined by their log-sum-exp in fp32, in the order of the
ranks, so that they come to the same bits wherever they are joined. What travels grows with the new tokens alone.

Legend: S tokens of this rank and T of the row, H heads, G key/value heads, K head dimension, M earlier keys here, P
pages of L tokens here, A tokens of all pages here, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.softmax import softmax_forward, softmax_merge, softmax_paged_step, softmax_suffix_forward
from mmtrain.infer.context.batch import ContextBatch
from mmtrain.infer.context.exchange import gather_alike, gather_shares, send_shares
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.serving.page_owner import PageOwner
from mmtrain.model.mixers.softmax_pages import SoftmaxPages
from mmtrain.parallel.context.flights import Flight


class ContextPages:
    """A rank's pages of a softmax layer.

    Attributes:
        local: them; page p of all ranks is its page p // R, on rank p mod R.
    """

    takes_padding = False  # no step with collectives has been recorded as a CUDA graph

    def __init__(self, local: SoftmaxPages, context: ContextParallel) -> None:
        self.local, self._context = local, context
        self._owner = PageOwner(context.ranks, context.rank, local.k_PLGK.shape[1])

    def begin(self, slot: int) -> None:
        """Do nothing: no slot has anything of this layer."""

    def copy_slot(self, source: int, target: int) -> None:
        """Do nothing, likewise."""

    def copy_page(self, source: int, target: int) -> None:
        """Let a page of any rank hold what another one holds."""
        (giver, source), (taker, target) = self._owner.place(source), self._owner.place(target)
        kept, mine = (self.local.k_PLGK, self.local.v_PLGK), self._context.rank
        if giver == taker:
            if mine == giver:
                self.local.copy_page(source, target)
        elif mine == giver:
            Flight([(pages[source], taker) for pages in kept], [], self._context.group).wait()
        elif mine == taker:
            Flight([], [(pages[target], giver) for pages in kept], self._context.group).wait()

    def view(self, batch: ContextBatch) -> SharedKeys:
        """Return the keys and values of these documents."""
        return SharedKeys(self.local.k_PLGK, self.local.v_PLGK, batch, self._context)


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values of the documents of one pass; both tensors are those of all pages of this rank."""

    k_PLGK: Tensor
    v_PLGK: Tensor
    batch: ContextBatch
    context: ContextParallel

    def attend(self, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> Tensor:
        """Add new keys and values to their owners' pages; return the causal attention of this rank's tokens, [S, H, K].

        It is over all keys of each document, whichever rank keeps them.
        """
        batch = self.batch
        q_THK, k_TGK, v_TGK = self._whole_row(q_SHK, k_SGK, v_SGK)
        for kept_AGK, new_TGK in zip(self._end_to_end(), (k_TGK, v_TGK), strict=True):
            kept_AGK.index_copy_(0, batch.places_W, new_TGK.index_select(0, batch.written_W))
        seen = slice(batch.seen.start, batch.seen.stop)
        o_SHK, lse_HS = softmax_suffix_forward(q_SHK, k_TGK[seen], v_TGK[seen], batch.suffixes)
        if not batch.continues:
            return o_SHK
        wide_SHK, lse_HS = o_SHK.to(lse_HS.dtype), lse_HS.contiguous()
        for part_SHK, part_lse_SH in zip(*self._exchange(*self._earlier(q_THK)), strict=True):
            softmax_merge(wide_SHK, lse_HS, part_SHK, part_lse_SH.T)
        return wide_SHK.to(q_SHK.dtype)

    def _whole_row(self, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> list[Tensor]:
        """Queries, keys and values of all tokens of the row."""
        if not self.batch.shared:
            return [q_SHK, k_SGK, v_SGK]
        heads = [x.shape[1] for x in (q_SHK, k_SGK, v_SGK)]
        return list(gather_shares(torch.cat([q_SHK, k_SGK, v_SGK], dim=1), self.batch.cut.sizes,
                                  self.context.group).split(heads, dim=1))  # fmt: skip

    def _end_to_end(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all pages here, [A, G, K] each; what is written to them is in the pages."""
        return self.k_PLGK.flatten(0, 1), self.v_PLGK.flatten(0, 1)

    def _earlier(self, q_THK: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of all new tokens to the earlier keys here, [T, H, K], and log-sum-exp [T, H]: 0, -inf without."""
        batch, stored = self.batch, self.batch.stored
        if stored is not None and batch.row.single:
            # This step adds a key behind the others and reads pages where they lie. What it is given to add is the
            # last earlier key, where that is already.
            last = (x_AGK.index_select(0, batch.stored_last_N) for x_AGK in self._end_to_end())
            return softmax_paged_step(q_THK, *last, self.k_PLGK, self.v_PLGK, stored.table_NP, stored.keys_N)
        o_THK = torch.zeros_like(q_THK, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q_THK.dtype, torch.float32)
        lse_TH = torch.full(q_THK.shape[:2], -torch.inf, dtype=wide, device=q_THK.device)
        for documents, part in stored.parts if stored is not None else []:
            k_MGK, v_MGK = (x_AGK.index_select(0, part.read_S) for x_AGK in self._end_to_end())
            first = 0
            for row, keys in zip(batch.stored_rows[documents], part.keys, strict=True):
                here = slice(first, first + keys)
                o_THK[row], lse_HQ = softmax_forward(q_THK[row], k_MGK[here], v_MGK[here], False)
                lse_TH[row], first = lse_HQ.T, first + keys
        return o_THK, lse_TH

    def _exchange(self, o_THK: Tensor, lse_TH: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' parts of this rank's tokens, [R, S, H, K] and [R, S, H]."""
        sizes, group = self.batch.cut.sizes, self.context.group
        if not self.batch.shared:
            return gather_alike(o_THK, group), gather_alike(lse_TH, group)
        return send_shares(o_THK, sizes, group), send_shares(lse_TH, sizes, group)
