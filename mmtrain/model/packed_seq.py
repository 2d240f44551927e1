"""The places of documents in a flattened row of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Boundaries of the documents in T flattened tokens.

    Attributes:
        cu_seqlens: int32 [documents + 1], first token of each document, then T; every row start is a boundary.
        position_ids_T: int64 [T], position of each token in its document.
        max_seqlen: the longest document, known without reading the device.
        lengths: tokens of each document, on the host. Where none are given, they are read from `cu_seqlens`, once; if
            that tensor is on a device, the host waits for the device.
    """

    cu_seqlens: Tensor
    position_ids_T: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.lengths:
            object.__setattr__(self, "lengths", tuple(self.cu_seqlens.diff().tolist()))

    @staticmethod
    def from_lengths(lengths: list[int], device: torch.device | str = "cpu", start: int = 0) -> Packing:
        """Lay documents of these lengths end to end; the first position of each is `start`."""
        counts = torch.tensor(lengths, dtype=torch.int64)
        cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu[1:] = counts.cumsum(0)
        first_T = torch.repeat_interleave(cu[:-1].long(), counts)
        positions_T = torch.arange(int(cu[-1])) - first_T + start
        return Packing(cu.to(device), positions_T.to(device), max(lengths, default=0), tuple(lengths))
