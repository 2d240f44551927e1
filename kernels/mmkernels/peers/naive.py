"""The definition of reading rows of other ranks, in plain torch.

Legend: M received rows, D columns, N rows that are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.peers.memory import PeerMemory


def naive_take_from_peers(memory: PeerMemory, out_MD: Tensor, source_M: Tensor | None, used_M: Tensor | None) -> None:
    """Copy rows of all ranks to `out_MD`: those of `source_M`, or of their own number where `used_M` is not below 0."""
    rows, width = out_MD.shape
    share = rows // len(memory.parts)
    mine = slice(memory.rank * share, (memory.rank + 1) * share)
    theirs = [memory.rows(rank, rows, width, out_MD.dtype)[mine] for rank in range(len(memory.parts))]
    index_M = used_M if source_M is None else source_M
    taken_N = (index_M >= 0).nonzero().flatten()
    number_N = taken_N if source_M is None else source_M[taken_N].long()
    out_MD[taken_N] = torch.cat(theirs)[number_N]
