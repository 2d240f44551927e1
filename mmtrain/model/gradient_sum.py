"""Products whose weight's gradient is added to a sum of many micro-batches where it is made.

A weight may carry such a sum in fp32, its attribute `gradient_sum`. Its gradient is then neither stored nor rounded in
the weight's type, and no pass over it follows: on one H200 these passes took 5% of a step of `hybrid_1b`.

Where the gradient is made in forward, as the head's is, it is that of the summed loss. The loss's factor comes in
backward and is the same for all micro-batches of a step, so it waits beside the sum, as `gradient_factor`, for whoever
takes the sum when the step's last backward is done.

Legend: T tokens, D input width, E output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def gradient_sum_of(weight: Tensor) -> Tensor | None:
    """Return the sum that takes a weight's gradients, of the weight's shape; None: autograd hands them on."""
    return getattr(weight, "gradient_sum", None)


def set_gradient_factor(weight: Tensor, factor: Tensor) -> None:
    """Say what a weight's sum is to be multiplied by, a scalar, before it is a gradient."""
    weight.gradient_factor = factor


def whole_gradient(weight: Tensor) -> Tensor:
    """Return the sum of a weight's gradients over the micro-batches of a step, which have all been through backward."""
    factor = getattr(weight, "gradient_factor", None)
    return weight.gradient_sum if factor is None else weight.gradient_sum.mul_(factor)


def project(x_TD: Tensor, weight: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Return W x, or W x + b, of every token, [T, E].

    Args:
        x_TD: any float dtype.
        weight: [.., D] with E rows in all, of the dtype of x.
        bias_E: of the same dtype, added within the product.
    """
    if gradient_sum_of(weight) is None or x_TD.ndim != 2 or not weight.requires_grad:
        return F.linear(x_TD, weight.flatten(0, -2), bias_E)
    return _Project.apply(x_TD, weight, bias_E)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        ctx.total_ED = gradient_sum_of(weight).flatten(0, -2)
        return F.linear(x_TD, weight.flatten(0, -2), bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_TE: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x_TD, weight = ctx.saved_tensors
        dx_TD = dy_TE @ weight.flatten(0, -2) if ctx.needs_input_grad[0] else None
        accumulate(ctx.total_ED, dy_TE, x_TD)
        return dx_TD, None, dy_TE.sum(0) if ctx.needs_input_grad[2] else None


def accumulate(total_ED: Tensor, dy_TE: Tensor, x_TD: Tensor) -> None:
    """Add dy^T x to `total`, in total's dtype."""
    if total_ED.dtype == x_TD.dtype:
        total_ED.addmm_(dy_TE.t(), x_TD)
    elif total_ED.is_cuda and total_ED.numel():  # added inside the product, which is neither rounded nor stored
        torch.addmm(total_ED, dy_TE.t(), x_TD, out_dtype=total_ED.dtype, out=total_ED)
    else:
        total_ED += dy_TE.t() @ x_TD
