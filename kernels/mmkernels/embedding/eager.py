"""The sum of rows in plain torch, in the sum's own dtype.

Legend: T tokens, V rows of the table, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add(total_VD: Tensor, tokens_T: Tensor, dy_TD: Tensor) -> None:
    """Add to `total` the rows of `dy` that its rows' tokens name; neither is empty."""
    own_T = (tokens_T >= 0) & (tokens_T < total_VD.shape[0])
    row_T = torch.where(own_T, tokens_T, 0)
    own_TD = torch.where(own_T[:, None], dy_TD.to(total_VD.dtype), 0.0)
    first_D = total_VD[0].clone()
    if total_VD.is_cuda:  # `index_add_` has atomics there; this sorts the tokens
        total_VD.index_put_((row_T,), own_TD, accumulate=True)
    else:
        total_VD.index_add_(0, row_T, own_TD)
    # Other tokens added 0 to the first row, which turns a -0 there into 0: it stays as it was if no token names it.
    total_VD[0] = torch.where((own_T & (row_T == 0)).any(), total_VD[0], first_D)
