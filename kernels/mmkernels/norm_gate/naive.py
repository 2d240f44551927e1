"""The definition of the gated norm, differentiable by plain autograd. It is the oracle of every backend.

Legend: T rows (tokens), I columns (all heads of a token).
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_norm_gate(o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """``sigmoid(gate) * weight * o / sqrt(mean(o^2) + eps)`` in float64 (MiniMax-01 2.2, Fig. 3; the released code).

    Args:
        o_TI: output of lightning attention, any floating dtype.
        gate_TI: gate before the sigmoid.
        weight_I: scale of the norm.
        eps: added to the mean square.

    Returns:
        y_TI in float64: the public function rounds it to the dtype of o.
    """
    o, gate, weight = o_TI.double(), gate_TI.double(), weight_I.double()
    return torch.sigmoid(gate) * weight * o / torch.sqrt(o.square().mean(-1, keepdim=True) + eps)
