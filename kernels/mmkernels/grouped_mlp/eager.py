"""The passes of the experts' MLP in torch, on any device: grouped products, and the kernel of the activation.

Legend: R rows sorted by expert, E experts, D model width, F expert width; M and N widths of one product.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmkernels.swiglu import swiglu, swiglu_grad


def grouped_mm(left: Tensor, right: Tensor, offset_E: Tensor) -> Tensor:
    """Products of groups of rows: the one function through which all matrix products of the experts go.

    A lower precision (FP8, say) enters here: it has both operands at hand before they are rounded, and is told by the
    dimensions of `right` whether rows are multiplied by weights or weights' gradients are summed over rows.

    Args:
        left: rows [R, M]; or their transpose [N, R], for a sum over each expert's rows.
        right: a matrix for each expert, [E, M, N]; or rows [R, M].
        offset_E: int32 [E], the row after each expert's last.

    Returns:
        [R, N], unwritten from row ``offset_E[-1]`` on; or [E, N, M].
    """
    return F.grouped_mm(left, right, offs=offset_E)


def forward(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor) -> tuple[Tensor, Tensor]:
    """The result [R, D] and the first product [R, 2F]. The activation's rows that belong to no expert are zeros."""
    gate_up_R2F = gate_up(x_RD, w13_E2FD, offset_E)
    return grouped_mm(swiglu(gate_up_R2F, offset_E[-1:]), w2_EDF.transpose(1, 2), offset_E), gate_up_R2F


def gate_up(x_RD: Tensor, w13_E2FD: Tensor, offset_E: Tensor) -> Tensor:
    """The first product, [R, 2F]: gate and up side by side."""
    return grouped_mm(x_RD, w13_E2FD.flatten(1, 2).transpose(1, 2), offset_E)


def gate_up_grad(dy_RD: Tensor, gate_up_R2F: Tensor, w2_EDF: Tensor, offset_E: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the first product, [R, 2F], and the activation once more, [R, F]."""
    return swiglu_grad(gate_up_R2F, grouped_mm(dy_RD, w2_EDF, offset_E), offset_E[-1:])


def input_grad(dgate_up_R2F: Tensor, w13_E2FD: Tensor, offset_E: Tensor) -> Tensor:
    """The gradient of the rows, [R, D]."""
    return grouped_mm(dgate_up_R2F, w13_E2FD.flatten(1, 2), offset_E)


def weight_grad(dout_RN: Tensor, in_RM: Tensor, offset_E: Tensor) -> Tensor:
    """The gradient of a weight, [E, N, M], from its product's gradient and input."""
    return grouped_mm(dout_RN.t(), in_RM, offset_E)
