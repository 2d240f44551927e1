"""The SwiGLU feed-forward: W2 (SiLU(W1 x) * W3 x).

Legend: T tokens, D model width, F inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


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


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up, of the two halves [..., 2F] of the last dimension; saves its input alone."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Recomputes SiLU in backward: one activation saved in place of three, and one gradient buffer."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        dgate, dup = grad.chunk(2, dim=-1)
        torch.mul(F.silu(gate), dy, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return grad
