"""One unit of the chunked backend: the chunks of a segment for a group of heads, as batches of small matrices.

Shape letters: B batch rows, T tokens, H heads, D width of q and k, E width of v, X either, C tokens of a chunk,
N chunks of the segment, G heads of the group, R = B*G*N in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.lightning.eager.decay import DecayTables
from mmkernels.lightning.eager.documents import SegmentMasks
from mmkernels.lightning.eager.plan import Segment


@dataclass(frozen=True)
class Unit:
    """Views and factors of one segment and group of heads.

    ``masks`` is None when no document changes in the segment; with masks, ``batch`` is 1.
    """

    segment: Segment
    heads: slice
    tables: DecayTables
    masks: SegmentMasks | None
    batch: int
    dtype: torch.dtype

    @property
    def grid(self) -> tuple[int, int, int]:
        """Sizes (B, G, N), whose product is R."""
        return self.batch, self.heads.stop - self.heads.start, self.segment.chunks

    def _view(self, x_BTHX: Tensor) -> Tensor:
        """View [B, G, N, C, X] of this unit's part of a tensor."""
        segment = self.segment
        part = x_BTHX[:, segment.start : segment.stop, self.heads]
        return part.unflatten(1, (segment.chunks, segment.length)).permute(0, 3, 1, 2, 4)

    def blocks(self, x_BTHX: Tensor) -> Tensor:
        """Chunks of the unit as [R, C, X] in the accumulation dtype; no copy for one head of one float32 row."""
        return self._view(x_BTHX).to(self.dtype).flatten(0, 2)

    def store(self, out_BTHX: Tensor, x_RCX: Tensor) -> None:
        """Write [R, C, X] to its place, rounding to the dtype there."""
        self._view(out_BTHX).copy_(x_RCX.unflatten(0, self.grid))

    def new_states(self, d: int, e: int) -> Tensor:
        """Memory for the states around each chunk, [B, G, N+1, D, E], not initialised."""
        batch, heads, chunks = self.grid
        return torch.empty(batch, heads, chunks + 1, d, e, dtype=self.dtype, device=self.tables.into_HC.device)

    def score_weights(self) -> Tensor:
        """Causal decay between the tokens of a chunk, [G, N or 1, C, C], zero between documents."""
        length = self.segment.length
        weights_G1CC = self.tables.scores_HCC[self.heads, None, :length, :length]
        return weights_G1CC if self.masks is None else weights_G1CC * self.masks.same_NCC

    def decay_scores_(self, scores_RCC: Tensor, weights_GNCC: Tensor | None = None) -> None:
        """Multiply products of all pairs in a chunk by their decay, in place."""
        scores_RCC.unflatten(0, self.grid).mul_(self.score_weights() if weights_GNCC is None else weights_GNCC)

    def scale_entering(self, x_RCX: Tensor) -> Tensor:
        """Weigh tokens by how the state entering their chunk reaches them: ``exp(-s (i+1))`` or 0."""
        weights_G1C1 = self.tables.into_HC[self.heads, None, : self.segment.length, None]
        return self._scale(x_RCX, weights_G1C1 if self.masks is None else weights_G1C1 * self.masks.lead_NC1)

    def scale_leaving(self, x_RCX: Tensor) -> Tensor:
        """Weigh tokens by how they reach the state leaving their chunk: ``exp(-s (C-1-i))`` or 0."""
        weights_G1C1 = self.tables.outof_HC[self.heads, None, -self.segment.length :, None]
        return self._scale(x_RCX, weights_G1C1 if self.masks is None else weights_G1C1 * self.masks.tail_NC1)

    def _scale(self, x_RCX: Tensor, weights_GNC1: Tensor) -> Tensor:
        return (x_RCX.unflatten(0, self.grid) * weights_GNC1).flatten(0, 2)

    def scan_forward_(self, path_BGNDE: Tensor, local_RDE: Tensor, carry_BGDE: Tensor | None = None) -> None:
        """Fill ``path[:, :, 1:]`` with the states leaving each chunk, from ``path[:, :, 0]`` and each chunk's own part.

        ``S_c = decay^C S_{c-1} + local_c`` for the whole segment as one triangular product. Overwrites ``local_RDE``
        and takes ``carry``, the entering state in float64, to the segment's end.
        """
        table_GNN = self._table(self.tables.chunks_HNN, "leaving_NN")
        self._scan_(path_BGNDE[:, :, 1:], path_BGNDE[:, :, 0], local_RDE, table_GNN, carry_BGDE, 0)

    def scan_backward_(self, path_BGNDE: Tensor, local_RDE: Tensor, carry_BGDE: Tensor) -> None:
        """Fill ``path[:, :, :-1]`` with gradients of the states entering each chunk, from ``path[:, :, -1]``.

        The recurrence of ``scan_forward_`` from the other end; ``carry`` is taken to the segment's start.
        """
        table_GNN = self._table(self.tables.chunks_HNN.transpose(1, 2), "entering_NN")
        self._scan_(path_BGNDE[:, :, :-1], path_BGNDE[:, :, -1], local_RDE, table_GNN, carry_BGDE, -1)

    def _table(self, powers_HNN: Tensor, mask: str) -> Tensor:
        """Decay between the states of the segment's chunks, [G, N, N]."""
        chunks = self.segment.chunks
        table_GNN = powers_HNN[self.heads, :chunks, :chunks]
        return table_GNN if self.masks is None else table_GNN * getattr(self.masks, mask)

    def _scan_(
        self,
        out_BGNDE: Tensor,
        enter_BGDE: Tensor,
        local_RDE: Tensor,
        table_GNN: Tensor,
        carry_BGDE: Tensor | None,
        near: int,
    ) -> None:
        """Triangular product over the chunks; ``near`` is the chunk that meets the entering state first (0 or -1)."""
        batch, heads, chunks = self.grid
        local_BGNDE = local_RDE.unflatten(0, self.grid)
        if carry_BGDE is not None:
            # Apart from the product below and in float64: otherwise each of its N sums would round the full state
            # again, and the error of a state that hardly decays would grow with the length of the row.
            far_G1N = table_GNN[:, None, -1 - near]
            own_BG1X = torch.matmul(far_G1N, local_BGNDE.flatten(3)) if chunks > 1 else local_BGNDE
            carry_BGDE.mul_(self._over_segment()).add_(own_BG1X.reshape(carry_BGDE.shape))
        local_BGNDE[:, :, near].addcmul_(enter_BGDE, self._through(near))
        if chunks == 1:
            out_BGNDE.copy_(local_BGNDE)
        elif batch * heads == 1:
            # The usual case on long rows: straight into place.
            torch.mm(table_GNN[0], local_BGNDE[0, 0].flatten(1), out=out_BGNDE[0, 0].flatten(1))
        else:
            out_BGNDE.copy_(torch.matmul(table_GNN, local_BGNDE.flatten(3)).view_as(local_BGNDE))

    def _through(self, chunk: int) -> Tensor:
        """Decay of a state across a chunk, [G, 1, 1]; 0 where the document changes."""
        factor_G11 = self.tables.into_HC[self.heads, self.segment.length - 1, None, None]
        return factor_G11 if self.masks is None else factor_G11 * self.masks.through_N[chunk]

    def _over_segment(self) -> Tensor:
        """Decay of a state across the segment, float64 [G, 1, 1]; 0 where the document changes."""
        factor_G11 = self.tables.over(self.segment.length * self.segment.chunks)[self.heads]
        return factor_G11 if self.masks is None else factor_G11 * self.masks.through_N.prod()
