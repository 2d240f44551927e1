"""The definition of SwiGLU's activation in plain torch, differentiated by autograd.

Legend: N rows, F inner width; 2F is gate and up side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_swiglu(gate_up_N2F: Tensor, rows: Tensor | None = None) -> Tensor:
    """SiLU(gate) * up of the two halves of the last dimension, [..., 2F] to [..., F]; zeros from row `rows` on."""
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    y = F.silu(gate) * up
    if rows is None:
        return y
    used_N = torch.arange(y.numel() // max(y.shape[-1], 1), device=y.device) < rows
    return torch.where(used_N.view(*y.shape[:-1], 1), y, 0)
