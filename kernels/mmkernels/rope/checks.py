"""Argument checks of the partial rotary embedding. They run before any work and never wait for a GPU.

Legend: T tokens, H heads, K head width, R rotated dimensions, R2 = R / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_tensor
from mmkernels.common.errors import KernelArgumentError


def check_arguments(x_THK: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> None:
    """Refuse heads and tables that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
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
