"""The public function of the partial rotary embedding, its checks and its autograd pair.

Legend: T tokens, H heads, K head width, R rotated dimensions, R2 = R / 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from mmkernels.common.checks import ALL_DTYPES, check_tensor, use_triton
from mmkernels.common.errors import KernelArgumentError
from mmkernels.rope import eager

Rotate = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def partial_rope(x_THK: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate the first R dimensions of every head, half against half (NeoX order); the rest passes through.

    ``out_i = x_i cos_i - x_{i+R/2} sin_i`` and ``out_{i+R/2} = x_{i+R/2} cos_i + x_i sin_i`` for i < R/2, in float32
    (MiniMax-01 section 2; half-split as in GPT-NeoX).

    Args:
        x_THK: queries or keys [T, H, K], float32, bfloat16, float16 (or float64, through torch); any strides with a
            contiguous last dimension.
        cos_TR2: cosines, float32 [T, R/2] with contiguous rows; no gradient flows to it.
        sin_TR2: sines, likewise.
        backend: "triton", "torch", or "auto": Triton on CUDA, except for float64, else torch.

    Returns:
        The rotated heads, contiguous, in the dtype of x. The gradient is the inverse rotation.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    _check_arguments(x_THK, cos_TR2, sin_TR2)
    rotate: Rotate = eager.rotate
    if use_triton(backend, "x_THK", x_THK):
        from mmkernels.rope.kernel import rotate  # only this path needs Triton
    return _Rope.apply(x_THK, cos_TR2, sin_TR2, False, rotate)


class _Rope(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_THK: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, inverse: bool, rotate: Rotate
    ) -> Tensor:
        ctx.save_for_backward(cos_TR2, sin_TR2)
        ctx.inverse, ctx.rotate = inverse, rotate
        return rotate(x_THK, cos_TR2, sin_TR2, inverse)

    @staticmethod
    def backward(ctx: FunctionCtx, dout_THK: Tensor) -> tuple[Tensor | None, ...]:
        if dout_THK.stride(-1) != 1:  # the gradient of a sum is one expanded number
            dout_THK = dout_THK.contiguous()
        return _Rope.apply(dout_THK, *ctx.saved_tensors, not ctx.inverse, ctx.rotate), None, None, None, None


def _check_arguments(x_THK: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> None:
    check_tensor("x_THK", x_THK, 3, ALL_DTYPES)
    tokens, width = x_THK.shape[0], x_THK.shape[2]
    for name, table in (("cos_TR2", cos_TR2), ("sin_TR2", sin_TR2)):
        check_tensor(name, table, 2, (torch.float32,))
        if table.shape[0] != tokens or not 0 < table.shape[1] <= width // 2:
            allowed = f"[{tokens}, R/2] with R/2 from 1 to {width // 2}"
            raise KernelArgumentError(name, f"shape {list(table.shape)}", allowed)
        if table.device != x_THK.device:
            raise KernelArgumentError(name, f"device {table.device}", f"the device of x_THK, {x_THK.device}")
        if table.requires_grad:
            raise KernelArgumentError(name, "requires_grad=True", "tables without gradient (they are constants)")
    if sin_TR2.shape != cos_TR2.shape:
        raise KernelArgumentError("sin_TR2", f"shape {list(sin_TR2.shape)}", f"that of cos, {list(cos_TR2.shape)}")
