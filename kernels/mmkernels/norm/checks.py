"""Argument checks of both norms. They run before any work and never wait for a GPU.

Legend: T rows (tokens), D columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_tensor
from mmkernels.common.errors import KernelArgumentError

TRITON_MAX_WIDTH = 16384
"""Widest row of one program: 32 warps hold 16 columns a thread."""


def check_arguments(x_TD: Tensor, y_TD: Tensor | None, alpha: float, weight_D: Tensor, eps: float) -> None:
    """Refuse arguments that do not fit together; ``y_TD`` None when there is no sum.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_tensor("x_TD", x_TD, 2, ALL_DTYPES)
    if x_TD.shape[1] == 0:
        raise KernelArgumentError("x_TD", f"shape {list(x_TD.shape)}", "at least one column")
    others = [("weight_D", weight_D, x_TD.shape[1:], (torch.float32, x_TD.dtype))]
    if y_TD is not None:
        others.append(("y_TD", y_TD, x_TD.shape, (x_TD.dtype,)))
    for name, x, shape, dtypes in others:
        check_tensor(name, x, len(shape), dtypes)
        if x.shape != shape:
            raise KernelArgumentError(name, f"shape {list(x.shape)}", f"{list(shape)} for x_TD {list(x_TD.shape)}")
        if x.device != x_TD.device:
            raise KernelArgumentError(name, f"device {x.device}", f"the device of x_TD, {x_TD.device}")
    if not eps >= 0:
        raise KernelArgumentError("eps", eps, "a number >= 0")
    if not math.isfinite(alpha):
        raise KernelArgumentError("alpha", alpha, "a finite number")
