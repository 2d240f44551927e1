"""Argument checks of the gated norm. They run before any work and never wait for a GPU.

Legend: T rows (tokens), I columns of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_beside, check_tensor
from mmkernels.common.errors import KernelArgumentError


def check_arguments(
    o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor, eps: float, width: int | None, reduce: object | None
) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_tensor("o_TI", o_TI, 2, ALL_DTYPES)
    if o_TI.shape[1] == 0:
        raise KernelArgumentError("o_TI", f"shape {list(o_TI.shape)}", "at least one column")
    check_beside("gate_TI", gate_TI, o_TI.shape, (o_TI.dtype,), "o_TI", o_TI)
    check_beside("weight_I", weight_I, o_TI.shape[1:], (torch.float32, o_TI.dtype), "o_TI", o_TI)
    if not eps >= 0:
        raise KernelArgumentError("eps", eps, "a number >= 0")
    if (width is None) != (reduce is None):
        raise KernelArgumentError("width", width, "the number of columns of all ranks with reduce, None without")
    if width is not None and width < o_TI.shape[1]:
        raise KernelArgumentError("width", width, f"at least the columns of this rank, {o_TI.shape[1]}")
