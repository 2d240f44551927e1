"""The public functions: RMSNorm, and the residual sum with RMSNorm after it.

Legend: T rows (tokens), D columns.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.common.checks import ROW_MAX_WIDTH, use_triton
from mmkernels.norm import eager
from mmkernels.norm.checks import check_arguments


class Passes(Protocol):
    """The passes that a backend provides: ``eager`` in torch, ``launch`` in Triton."""

    def forward(
        self, x_TD: Tensor, y_TD: Tensor | None, alpha: float, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(normed, h, rstd_T)``; h is x itself when there is no y."""

    def backward(
        self,
        dnormed_TD: Tensor,
        dh_TD: Tensor | None,
        h_TD: Tensor,
        alpha: float | None,
        weight_D: Tensor,
        rstd_T: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """``(dx, dy, dweight)``; with ``alpha`` None there was no sum, and dy is None."""


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, float32 inside (MiniMax-01 section 2, Fig. 3).

    Args:
        x_TD: rows [T, D], float32, bfloat16, float16 (or float64, through torch); rows may lie at any distance,
            columns must be contiguous.
        weight_D: scale [D], float32 or the dtype of x.
        eps: added to the mean square.
        backend: "triton", "torch", or "auto": Triton on CUDA, up to 16384 columns, else torch.

    Returns:
        The normed rows, contiguous, in the dtype of x. Gradients flow to x and weight; no second derivatives.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_arguments(x_TD, None, 1.0, weight_D, eps)
    return _Norm.apply(x_TD, weight_D, eps, _passes(backend, x_TD))


def add_rms_norm(
    x_TD: Tensor, y_TD: Tensor, alpha: float, weight_D: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``h = alpha x + y``, rounded to the input dtype, and RMSNorm of h (the residual of MiniMax-01 2, Fig. 3).

    Args:
        x_TD: residual [T, D], as in :func:`rms_norm`.
        y_TD: output of the layer, same shape and dtype.
        alpha: factor of the residual (DeepNorm), a constant.
        weight_D: scale of the norm [D], float32 or the dtype of x.
        eps: added to the mean square.
        backend: as in :func:`rms_norm`.

    Returns:
        ``(normed_TD, h_TD)``, contiguous, in the dtype of x. Gradients flow from both, to x, y and weight.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_arguments(x_TD, y_TD, alpha, weight_D, eps)
    return _AddNorm.apply(x_TD, y_TD, float(alpha), weight_D, eps, _passes(backend, x_TD))


def _passes(backend: str, x_TD: Tensor) -> Passes:
    if not use_triton(backend, "x_TD", x_TD, ROW_MAX_WIDTH):
        return eager
    from mmkernels.norm import launch  # only this path needs Triton

    return launch


def _rows(gradient: Tensor | None) -> Tensor | None:
    """The gradient with contiguous columns: that of a sum is one expanded number."""
    return gradient if gradient is None or gradient.stride(-1) == 1 else gradient.contiguous()


class _Norm(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight_D: Tensor, eps: float, passes: Passes) -> Tensor:
        normed_TD, _, rstd_T = passes.forward(x_TD, None, 1.0, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, rstd_T)
        ctx.passes = passes
        return normed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dnormed_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, rstd_T = ctx.saved_tensors
        dx_TD, _, dweight_D = ctx.passes.backward(_rows(dnormed_TD), None, x_TD, None, weight_D, rstd_T)
        return dx_TD, dweight_D, None, None


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TD: Tensor, y_TD: Tensor, alpha: float, weight_D: Tensor, eps: float, passes: Passes
    ) -> tuple[Tensor, Tensor]:
        normed_TD, h_TD, rstd_T = passes.forward(x_TD, y_TD, alpha, weight_D, eps)
        ctx.save_for_backward(h_TD, weight_D, rstd_T)
        ctx.alpha, ctx.passes = alpha, passes
        ctx.set_materialize_grads(False)  # post-norm uses h nowhere else: its gradient is then not read at all
        return normed_TD, h_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dnormed_TD: Tensor | None, dh_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        h_TD, weight_D, rstd_T = ctx.saved_tensors
        if dnormed_TD is None:
            dnormed_TD = torch.zeros_like(h_TD)
        dx_TD, dy_TD, dweight_D = ctx.passes.backward(
            _rows(dnormed_TD), _rows(dh_TD), h_TD, ctx.alpha, weight_D, rstd_T
        )
        return dx_TD, dy_TD, None, dweight_D, None, None
