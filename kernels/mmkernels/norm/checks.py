"""Argument checks of both norms. They run before any work and never wait for a GPU.

Legend: T rows (tokens), D columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_beside, check_tensor
from mmkernels.common.errors import KernelArgumentError


def check_arguments(x_TD: Tensor, y_TD: Tensor | None, alpha: float, weight_D: Tensor, eps: float) -> None:
    """Refuse arguments that do not fit together; ``y_TD`` None when there is no sum.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_tensor("x_TD", x_TD, 2, ALL_DTYPES)
    if x_TD.shape[1] == 0:
        raise KernelArgumentError("x_TD", f"shape {list(x_TD.shape)}", "at least one column")
    check_beside("weight_D", weight_D, x_TD.shape[1:], (torch.float32, x_TD.dtype), "x_TD", x_TD)
    if y_TD is not None:
        check_beside("y_TD", y_TD, x_TD.shape, (x_TD.dtype,), "x_TD", x_TD)
    if not eps >= 0:
        raise KernelArgumentError("eps", eps, "a number >= 0")
    if not math.isfinite(alpha):
        raise KernelArgumentError("alpha", alpha, "a finite number")
