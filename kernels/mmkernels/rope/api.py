"""The public function of the partial rotary embedding and its autograd pair.

Legend: T tokens, H heads, K head width, R rotated dimensions, R2 = R / 2.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from mmkernels.common.checks import use_triton
from mmkernels.rope import eager
from mmkernels.rope.checks import check_arguments

Rotate = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""A backend's rotation of heads by cosines and sines; the last argument turns the other way."""


def partial_rope(x_THK: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate the first R dimensions of every head, half against half (NeoX order); the rest passes through.

    ``out_i = x_i cos_i - x_{i+R/2} sin_i`` and ``out_{i+R/2} = x_{i+R/2} cos_i + x_i sin_i`` for i < R/2, in float32
    (MiniMax-01 section 2; half-split as in GPT-NeoX).

    Args:
        x_THK: queries or keys [T, H, K], float32, bfloat16, float16 (or float64, through torch); any strides with a
            contiguous last dimension.
        cos_TR2: cosines, float32 [T, R/2] with contiguous rows; no gradient flows to it.
        sin_TR2: sines, of the same shape and dtype.
        backend: "triton", "torch", or "auto": Triton on CUDA, except for float64, else torch.

    Returns:
        The rotated heads, contiguous, in the dtype of x. The gradient is the inverse rotation.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_arguments(x_THK, cos_TR2, sin_TR2)
    rotate: Rotate = eager.rotate
    if use_triton(backend, "x_THK", x_THK):
        from mmkernels.rope.launch import rotate  # only this path needs Triton
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
