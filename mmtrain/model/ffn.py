"""The SwiGLU feed-forward: W2 (SiLU(W1 x) * W3 x).

Legend: T tokens, D model width, F inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.swiglu import swiglu


class SwiGLU(nn.Module):
    """Feed-forward of a dense layer, and of the shared expert (MiniMax-01 section 2.1; released code).

    W1 (gate) and W3 (up) are stacked as w13 [2, F, D], so that a shard of F holds rows of both.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.w13_2FD = nn.Parameter(torch.empty(2, ffn_hidden_size, hidden_size))
        self.w2_DF = nn.Parameter(torch.empty(hidden_size, ffn_hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply to every token; [T, D] to [T, D]."""
        return F.linear(swiglu(F.linear(x_TD, self.w13_2FD.flatten(0, 1))), self.w2_DF)
