"""The SwiGLU feed-forward: W2 (SiLU(W1 x) * W3 x).

Legend: T tokens, D model width, F inner width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mmkernels.swiglu import swiglu
from mmtrain.model.gradient_sum import project
from mmtrain.model.initial import Initial, Xavier
from mmtrain.model.sequence import SequenceRegion, WholeSequence
from mmtrain.model.weights import local


class FeedForwardCall(Protocol):
    """The way of computing a feed-forward: :func:`whole_feed_forward`, or one that saves less for backward."""

    def __call__(self, x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
        """Return W2 (SiLU(W1 x) * W3 x) of every token; [T, D] to [T, D], or a part of it, as the weights are."""


def whole_feed_forward(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """W2 (SiLU(W1 x) * W3 x) of all tokens at once; autograd saves x, the first product and the activation."""
    return project(swiglu(project(x_TD, w13_2FD)), w2_DF)


class SwiGLU(nn.Module):
    """The feed-forward of a dense layer, and of the shared expert (MiniMax-01 section 2.1; released code).

    W1 (gate) and W3 (up) are stacked as w13 [2, F, D], so that a shard of F holds rows of both.

    Attributes:
        sequence: brings the tokens of all ranks here, and sums partial results over ranks.
        call: computes the products, of all tokens at once or of some at a time.

    Args:
        hidden_size: D.
        ffn_hidden_size: F.
        gain: initial gain of all three matrices.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int, gain: float = 1.0) -> None:
        super().__init__()
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.w13_2FD = nn.Parameter(torch.empty(2, ffn_hidden_size, hidden_size))
        self.w2_DF = nn.Parameter(torch.empty(hidden_size, ffn_hidden_size))
        self.initial: dict[str, Initial] = {"w13_2FD": Xavier(gain), "w2_DF": Xavier(gain)}
        self.sequence: SequenceRegion = WholeSequence()
        self.call: FeedForwardCall = whole_feed_forward

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W2 (SiLU(W1 x) * W3 x) of every token; [T, D] to [T, D]."""
        x_TD = self.sequence.gather_from(x_TD)
        return self.sequence.reduce_scatter_to(self.call(x_TD, local(self.w13_2FD), local(self.w2_DF)))
