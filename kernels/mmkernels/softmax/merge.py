"""Results of two blocks of keys joined, in plain torch: float32 inside (float64 where anything is float64).

Legend: T queries, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(o_THD: Tensor, lse_HT: Tensor, part_THD: Tensor, part_lse_HT: Tensor) -> None:
    """Add a block's part to the output and log-sum-exp of other keys, in place."""
    largest_HT = torch.maximum(lse_HT, part_lse_HT)
    # A query that has seen no key: -inf - -inf would be no number.
    largest_HT.masked_fill_(largest_HT == -torch.inf, 0.0)
    mine_HT, other_HT = (torch.exp(lse - largest_HT) for lse in (lse_HT, part_lse_HT))
    total_HT = mine_HT + other_HT
    lse_HT.copy_(largest_HT.add_(total_HT.log()))
    total_HT.masked_fill_(total_HT == 0, 1.0)
    mine_TH1, other_TH1 = (weight.div_(total_HT).T[..., None] for weight in (mine_HT, other_HT))
    o_THD.copy_((mine_TH1 * o_THD).addcmul_(other_TH1, part_THD.to(other_TH1.dtype)))
