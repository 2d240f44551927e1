"""The definition of the experts' MLP in plain torch, an expert at a time, differentiated by autograd.

Legend: R rows sorted by expert, E experts, D model width, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_grouped_mlp(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor) -> Tensor:
    """``W2 (SiLU(W1 x) * W3 x)`` of each expert's rows, in the dtype of x; zeros for rows that belong to no expert."""
    ends, outputs = offset_E.tolist(), []
    for begin, end, (w1_FD, w3_FD), w2_DF in zip([0, *ends], ends, w13_E2FD, w2_EDF, strict=False):
        x = x_RD[begin:end]
        outputs.append((F.silu(x @ w1_FD.T) * (x @ w3_FD.T)) @ w2_DF.T)
    return torch.cat([*outputs, x_RD.new_zeros(x_RD.shape[0] - ends[-1], x_RD.shape[1])])
