"""The public function of the gated norm and its autograd pair.

Legend: T rows (tokens), I columns of this rank (its heads times their width).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.common.checks import ROW_MAX_WIDTH, use_triton
from mmkernels.norm_gate import eager
from mmkernels.norm_gate.checks import check_arguments

Reduce = Callable[[Tensor], Tensor]
"""Sums a float32 [T] tensor over the ranks that share the rows, in place or not."""


class Passes(Protocol):
    """The passes that a backend provides: ``eager`` in torch, ``launch`` in Triton."""

    def sum_squares(self, o_TI: Tensor) -> Tensor:
        """Sum of squares of every row: float32 [T]."""

    def forward(
        self, o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor, eps: float, inv_width: float, sumsq_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The output y and rstd_T."""

    def dots(self, dy_TI: Tensor, o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor) -> Tensor:
        """Sum of dy * sigmoid(gate) * weight * o over every row: float32 [T]."""

    def backward(
        self,
        dy_TI: Tensor,
        o_TI: Tensor,
        gate_TI: Tensor,
        weight_I: Tensor,
        rstd_T: Tensor,
        inv_width: float,
        dot_T: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """do, dgate and dweight."""


def norm_gate(
    o_TI: Tensor,
    gate_TI: Tensor,
    weight_I: Tensor,
    eps: float,
    *,
    width: int | None = None,
    reduce: Reduce | None = None,
    backend: str = "auto",
) -> Tensor:
    """``sigmoid(gate) * weight * o / sqrt(mean(o^2) + eps)``, the norm after lightning attention in its layer.

    The mean runs over all heads of a token (MiniMax-01 section 2.2 and Fig. 3; the released code). float32 inside.

    Args:
        o_TI: output of the attention [T, I], float32, bfloat16, float16 (or float64, through torch); rows may lie at
            any distance, columns must be contiguous.
        gate_TI: gate before the sigmoid, of the same shape and dtype.
        weight_I: scale of the norm [I], float32 or the dtype of o.
        eps: added to the mean square.
        width: under tensor parallelism, the number of columns of all ranks together.
        reduce: under tensor parallelism, sums a float32 [T] tensor over the ranks that share the rows (an all-reduce,
            in place or not). It is called once in forward and once in backward, on every rank alike, T = 0 included.
        backend: "triton", "torch", or "auto": Triton on CUDA, up to 16384 columns, else torch.

    Returns:
        y_TI, contiguous, in the dtype of o. Gradients flow to o, gate and weight (the local columns' part of each);
        there are no second derivatives.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_arguments(o_TI, gate_TI, weight_I, eps, width, reduce)
    passes: Passes = eager
    if use_triton(backend, "o_TI", o_TI, ROW_MAX_WIDTH):
        from mmkernels.norm_gate import launch as passes  # only this path needs Triton
    return _NormGate.apply(o_TI, gate_TI, weight_I, eps, 1.0 / (width or o_TI.shape[1]), reduce, passes)


class _NormGate(Function):
    """One pass each way; with ``reduce``, a pass for the statistic of the local columns, its sum, and a pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        o_TI: Tensor,
        gate_TI: Tensor,
        weight_I: Tensor,
        eps: float,
        inv_width: float,
        reduce: Reduce | None,
        passes: Passes,
    ) -> Tensor:
        sumsq_T = reduce(passes.sum_squares(o_TI)) if reduce else None
        y_TI, rstd_T = passes.forward(o_TI, gate_TI, weight_I, eps, inv_width, sumsq_T)
        ctx.save_for_backward(o_TI, gate_TI, weight_I, rstd_T)
        ctx.inv_width, ctx.reduce, ctx.passes = inv_width, reduce, passes
        return y_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_TI: Tensor) -> tuple[Tensor | None, ...]:
        o_TI, gate_TI, weight_I, rstd_T = ctx.saved_tensors
        if dy_TI.stride(-1) != 1:  # the gradient of a sum is one expanded number
            dy_TI = dy_TI.contiguous()
        dot_T = ctx.reduce(ctx.passes.dots(dy_TI, o_TI, gate_TI, weight_I)) if ctx.reduce else None
        grads = ctx.passes.backward(dy_TI, o_TI, gate_TI, weight_I, rstd_T, ctx.inv_width, dot_T)
        return *grads, None, None, None, None
