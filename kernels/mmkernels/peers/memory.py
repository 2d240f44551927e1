"""Memory of all ranks of a host, mapped into one of them.

Legend: W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PeerMemory:
    """Memory of all ranks of a host, as one of them reaches it.

    Attributes:
        parts: of each rank, uint8, of the same size and aligned to 16 bytes; how they were mapped is the caller's work.
        rank: whose part this process owns.
        address_W: where they begin, int64, on the device that is to read them.
    """

    parts: Sequence[Tensor]
    rank: int
    address_W: Tensor = field(init=False)

    def __post_init__(self) -> None:
        addresses = torch.tensor([part.data_ptr() for part in self.parts], device=self.parts[self.rank].device)
        object.__setattr__(self, "address_W", addresses)

    def rows(self, rank: int, number: int, width: int, dtype: torch.dtype) -> Tensor:
        """The first rows of a rank's part, [number, width]."""
        return self.parts[rank][: number * width * dtype.itemsize].view(dtype).view(number, width)
