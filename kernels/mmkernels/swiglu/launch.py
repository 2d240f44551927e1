"""SwiGLU's activation through the Triton kernels, with its autograd pair and launch shapes (all tunables are here).

Legend: N rows, F inner width; 2F is gate and up side by side.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.common.launch_shapes import dividing_block
from mmkernels.swiglu.kernels import swiglu_backward_kernel, swiglu_forward_kernel

MAX_BLOCK = 1024
"""Elements of a row's half that one program takes, a power of two."""
ELEMENTS_PER_THREAD = 8
"""One load of 16 bytes a thread and half in 16-bit dtypes."""


def triton_swiglu(gate_up_N2F: Tensor, rows: Tensor | None) -> Tensor:
    """SiLU(gate) * up: the backend "triton" of `swiglu`, which has checked the arguments."""
    return _SwiGLU.apply(gate_up_N2F, rows)


def triton_swiglu_grad(
    gate_up_N2F: Tensor, dy_NF: Tensor, rows: Tensor | None, with_output: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient, and output where it is asked for: the backend "triton" of `swiglu_grad`, which has checked all."""
    gate_up_N2F, dy_NF = gate_up_N2F.contiguous(), dy_NF.contiguous()
    grad_N2F, (count, width) = torch.empty_like(gate_up_N2F), dy_NF.shape
    y_NF = torch.empty_like(dy_NF) if with_output else None
    block = dividing_block(width, MAX_BLOCK)
    if dy_NF.numel():
        swiglu_backward_kernel[(count * triton.cdiv(width, block),)](
            gate_up_N2F, dy_NF, grad_N2F, y_NF, rows,
            F=width, BLOCK=block, HAS_ROWS=rows is not None, HAS_Y=with_output, num_warps=_warps(block),
        )  # fmt: skip
    return grad_N2F, y_NF


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate_up_N2F: Tensor, rows: Tensor | None) -> Tensor:
        gate_up_N2F = gate_up_N2F.contiguous()
        ctx.save_for_backward(gate_up_N2F, rows)
        count, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
        y_NF = torch.empty(count, width, dtype=gate_up_N2F.dtype, device=gate_up_N2F.device)
        block = dividing_block(width, MAX_BLOCK)
        if y_NF.numel():
            swiglu_forward_kernel[(count * triton.cdiv(width, block),)](
                gate_up_N2F, y_NF, rows, F=width, BLOCK=block, HAS_ROWS=rows is not None, num_warps=_warps(block)
            )
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NF: Tensor) -> tuple[Tensor, None]:
        gate_up_N2F, rows = ctx.saved_tensors
        return triton_swiglu_grad(gate_up_N2F, dy_NF, rows)[0], None


def _warps(block: int) -> int:
    return max(1, block // (32 * ELEMENTS_PER_THREAD))
