"""The experts, and the way tokens get to them and back: the one place where a layer of experts meets other devices.

:class:`Experts` holds an :class:`ExpertCall`; expert parallelism replaces it by one with all-to-alls.

Legend: T tokens, D model width, F expert width, E experts, R rows, of which the kept assignments are the first.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mmkernels.grouped_mlp import grouped_mlp
from mmkernels.moe import Route, permute, unpermute
from mmtrain.model.initial import Initial, Xavier
from mmtrain.model.moe.expert_chunks import experts_in_chunks
from mmtrain.model.weights import local


class Experts(nn.Module):
    """E SwiGLU experts, stacked; FFN_i(x) = W2_i (SiLU(W1_i x) * W3_i x).

    Attributes:
        call: how tokens get to the experts and back.
        chunk_rows: rows that are multiplied at once, of which nothing but the input waits for backward; None: all.

    Args:
        num_experts: E.
        hidden_size: D.
        ffn_hidden_size: F.
        gain: initial gain of all matrices.
    """

    def __init__(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, gain: float = 1.0) -> None:
        super().__init__()
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.w13_E2FD = nn.Parameter(torch.empty(num_experts, 2, ffn_hidden_size, hidden_size))
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_hidden_size))
        self.initial: dict[str, Initial] = {"w13_E2FD": Xavier(gain), "w2_EDF": Xavier(gain)}
        self.call: ExpertCall = LocalExperts()
        self.chunk_rows: int | None = None

    def forward(self, x_TD: Tensor, plan: Route) -> Tensor:
        """Return the weighted sum over each token's kept experts, [T, D]."""
        return self.call(self, x_TD, plan)

    def products(self, x_RD: Tensor, offset_E: Tensor) -> Tensor:
        """Run rows sorted by expert; [R, D] to [R, D].

        Args:
            x_RD: tokens; rows from `offset_E[-1]` on belong to nobody.
            offset_E: int32, the row after each expert's last.

        Returns:
            Results of the used rows. The other rows of the output, and of the input's gradient, are unwritten:
            whoever reads them must skip these.
        """
        w13_E2FD, w2_EDF = local(self.w13_E2FD), local(self.w2_EDF)
        if self.chunk_rows is not None:
            return experts_in_chunks(x_RD, w13_E2FD, w2_EDF, offset_E, self.chunk_rows)
        return grouped_mlp(x_RD, w13_E2FD, w2_EDF, offset_E)


class ExpertCall(Protocol):
    """The way tokens get to the experts of a layer and back."""

    def __call__(self, experts: Experts, x_TD: Tensor, plan: Route) -> Tensor:
        """Return the weighted sum over each token's kept experts, [T, D]."""


class LocalExperts:
    """All experts on this device: gather rows, multiply, add up."""

    def __call__(self, experts: Experts, x_TD: Tensor, plan: Route) -> Tensor:
        """Return the weighted sum over each token's kept experts, [T, D]."""
        x_RD = permute(x_TD, plan)
        return unpermute(experts.products(x_RD, plan.offset_E), plan.weight_TK, plan)
