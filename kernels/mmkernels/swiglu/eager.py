"""SwiGLU's activation in torch, saving its input alone: the CPU's path.

Legend: N rows, F inner width; 2F is gate and up side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def eager_swiglu(gate_up_N2F: Tensor, rows: Tensor | None) -> Tensor:
    """SiLU(gate) * up, [N, F]. With `rows` on a device, the host waits to read it."""
    return _SwiGLU.apply(gate_up_N2F, gate_up_N2F.shape[0] if rows is None else int(rows))


def eager_swiglu_grad(
    gate_up_N2F: Tensor, dy_NF: Tensor, rows: int, with_output: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the input [N, 2F], and the output [N, F] where it is asked for; zeros from `rows` on."""
    gate, up = gate_up_N2F[:rows].chunk(2, dim=-1)
    grad_N2F = torch.empty_like(gate_up_N2F)
    grad_N2F[rows:] = 0
    dgate, dup = grad_N2F[:rows].chunk(2, dim=-1)
    dy, silu = dy_NF[:rows], F.silu(gate)
    torch.mul(silu, dy, out=dup)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    if not with_output:
        return grad_N2F, None
    y_NF = torch.empty_like(dy_NF)
    y_NF[rows:] = 0
    torch.mul(silu, up, out=y_NF[:rows])
    return grad_N2F, y_NF


class _SwiGLU(torch.autograd.Function):
    """Computes SiLU again in backward: one activation is saved in place of three, and one gradient buffer is used."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up_N2F: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        ctx.rows = rows
        gate, up = gate_up_N2F[:rows].chunk(2, dim=-1)
        if rows == gate_up_N2F.shape[0]:
            return F.silu(gate).mul_(up)
        y_NF = gate_up_N2F.new_zeros(gate_up_N2F.shape[0], gate.shape[1])
        torch.mul(F.silu(gate), up, out=y_NF[:rows])
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NF: Tensor) -> tuple[Tensor, None]:
        (gate_up_N2F,) = ctx.saved_tensors
        return eager_swiglu_grad(gate_up_N2F, dy_NF, ctx.rows)[0], None
