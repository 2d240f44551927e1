"""Public functions of the experts' MLP: one that autograd differentiates, and its parts for a backward pass by hand.

Legend: R rows sorted by expert, E experts, D model width, F expert width; M and N widths of one product.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.grouped_mlp import eager
from mmkernels.grouped_mlp.checks import check_first, check_grad, check_mlp, check_weight_grad


def grouped_mlp(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor) -> Tensor:
    """Each expert's SwiGLU MLP of its own rows, ``W2 (SiLU(W1 x) * W3 x)`` (MiniMax-01 paper, section 2.1).

    Saves x and the first product for the backward; the activation between the products is computed again.

    Args:
        x_RD: tokens, [R, D], bfloat16, float16, float32 or float64; the rows of expert e end before ``offset_E[e]``.
            Rows from ``offset_E[-1]`` on belong to no expert and may hold anything.
        w13_E2FD: gate and up weights, [E, 2, F, D], in the dtype of x.
        w2_EDF: down weights, [E, D, F], in the dtype of x.
        offset_E: int32 [E], the row after each expert's last; equal to the one before for an expert without rows.

    Returns:
        [R, D] in the dtype of x. Rows that belong to no expert are unwritten, in the result and in the gradient of x:
        whoever reads either must skip them. Gradients flow to x and to the weights; there are no second derivatives.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_mlp(x_RD, w13_E2FD, w2_EDF, offset_E)
    return _GroupedMLP.apply(x_RD, w13_E2FD, w2_EDF, offset_E)


def grouped_mlp_forward(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass of :func:`grouped_mlp` without autograd, for an exchange that runs backward in steps of its own.

    Args:
        x_RD: as for :func:`grouped_mlp`, like all the others.

    Returns:
        The result [R, D], and the first product ``gate_up_R2F`` [R, 2F], which the backward needs beside x.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_mlp(x_RD, w13_E2FD, w2_EDF, offset_E)
    return eager.forward(x_RD, w13_E2FD, w2_EDF, offset_E)


def grouped_gate_up(x_RD: Tensor, w13_E2FD: Tensor, offset_E: Tensor) -> Tensor:
    """The first product of :func:`grouped_mlp` alone, for a backward pass that did not save it.

    Args:
        x_RD: as for :func:`grouped_mlp`, like the others.

    Returns:
        ``gate_up_R2F``, [R, 2F]; rows that belong to no expert are unwritten.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_first(x_RD, w13_E2FD, offset_E)
    return eager.gate_up(x_RD, w13_E2FD, offset_E)


def grouped_mlp_input_grad(
    dy_RD: Tensor, gate_up_R2F: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the rows of :func:`grouped_mlp`, and what the gradients of its weights are then made of.

    The gradients of the weights are two calls of :func:`grouped_weight_grad`, which may come later: ``(dy, hidden)``
    give that of w2, ``(dgate_up, x)`` that of w13.

    Args:
        dy_RD: gradient of the result, [R, D]; rows that belong to no expert are not read.
        gate_up_R2F: the first product, from :func:`grouped_mlp_forward`.
        w13_E2FD: as in forward, like the others.

    Returns:
        ``dx_RD``, ``dgate_up_R2F`` and the activation ``hidden_RF``. Rows of dx that belong to no expert are unwritten.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_grad(dy_RD, gate_up_R2F, w13_E2FD, w2_EDF, offset_E)
    dgate_up_R2F, hidden_RF = eager.gate_up_grad(dy_RD, gate_up_R2F, w2_EDF, offset_E)
    return eager.input_grad(dgate_up_R2F, w13_E2FD, offset_E), dgate_up_R2F, hidden_RF


def grouped_weight_grad(dout_RN: Tensor, in_RM: Tensor, offset_E: Tensor) -> Tensor:
    """The gradient of each expert's weight W in ``out = in W^T``: the sum of ``dout in^T`` over the expert's rows.

    Args:
        dout_RN: gradient of the product, [R, N]; rows that belong to no expert are not read.
        in_RM: its input, [R, M], in the same dtype; rows that belong to no expert are not read.
        offset_E: as for :func:`grouped_mlp`.

    Returns:
        [E, N, M], zeros for an expert without rows.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_weight_grad(dout_RN, in_RM, offset_E)
    return eager.weight_grad(dout_RN, in_RM, offset_E)


class _GroupedMLP(Function):
    """Computes what autograd would, product by product, but the activation once more in place of saving it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor) -> Tensor:
        y_RD, gate_up_R2F = eager.forward(x_RD, w13_E2FD, w2_EDF, offset_E)
        x_RD = x_RD if ctx.needs_input_grad[1] else None  # for the gradient of w13 alone
        ctx.save_for_backward(x_RD, gate_up_R2F, w13_E2FD, w2_EDF, offset_E)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_RD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_RD, gate_up_R2F, w13_E2FD, w2_EDF, offset_E = ctx.saved_tensors
        needs_x, needs_w13, needs_w2, _ = ctx.needs_input_grad
        dgate_up_R2F, hidden_RF = eager.gate_up_grad(dy_RD, gate_up_R2F, w2_EDF, offset_E)
        dw2_EDF = eager.weight_grad(dy_RD, hidden_RF, offset_E) if needs_w2 else None
        del hidden_RF  # before the products that follow take memory
        dx_RD = eager.input_grad(dgate_up_R2F, w13_E2FD, offset_E) if needs_x else None
        dw13_E2FD = eager.weight_grad(dgate_up_R2F, x_RD, offset_E).view_as(w13_E2FD) if needs_w13 else None
        return dx_RD, dw13_E2FD, dw2_EDF, None
