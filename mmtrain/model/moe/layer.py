"""The mixture of experts of a layer.

Legend: T tokens, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.model.ffn import SwiGLU
from mmtrain.model.linear import Linear
from mmtrain.model.moe.experts import Experts
from mmtrain.model.moe.router import Router, RouterStats
from mmtrain.model.packed_seq import Packing
from mmtrain.model.weights import local


class MoE(nn.Module):
    """h = sum over the chosen experts of softmax(top-k logits)_i * FFN_i(x) (MiniMax-01 eq. 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.router = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.ffn_hidden_size, config.beta)
        self.shared = SharedExpert(config) if config.shared_ffn_hidden_size else None

    def forward(self, x_TD: Tensor, packing: Packing | None = None) -> tuple[Tensor, RouterStats]:
        """Return the mixture's output for every token, [T, D], and what the router did.

        Args:
            x_TD: tokens of this process.
            packing: says which tokens are padding, and get nothing of routed experts; None: there is none.
        """
        plan, stats = self.router(x_TD, packing)
        out_TD = self.experts(x_TD, plan)
        return (out_TD if self.shared is None else self.shared(x_TD, out_TD)), stats


class SharedExpert(nn.Module):
    """out = (1 - g) * experts + g * shared, g = sigmoid(w . x) in fp32 (released code; off in the released model)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.mlp = SwiGLU(config.hidden_size, config.shared_ffn_hidden_size, config.beta)
        self.coefficient = Linear(config.hidden_size, 1)

    def forward(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """Return, [T, D], the blend of the shared expert's output for x and the routed experts' output."""
        gate_T1 = torch.sigmoid(F.linear(x_TD.float(), local(self.coefficient.weight).float()))
        return torch.lerp(routed_TD.float(), self.mlp(x_TD).float(), gate_T1).to(x_TD.dtype)
