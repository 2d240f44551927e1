"""Argument checks of the gated norm. They run before any work and never wait for a GPU.

Legend: T rows (tokens), I columns of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_tensor
from mmkernels.common.errors import KernelArgumentError

TRITON_MAX_WIDTH = 16384
"""Widest row of one program: 32 warps hold 16 columns a thread."""


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
    check_tensor("gate_TI", gate_TI, 2, (o_TI.dtype,))
    check_tensor("weight_I", weight_I, 1, (torch.float32, o_TI.dtype))
    for name, x, shape in (("gate_TI", gate_TI, o_TI.shape), ("weight_I", weight_I, o_TI.shape[1:])):
        if x.shape != shape:
            raise KernelArgumentError(name, f"shape {list(x.shape)}", f"{list(shape)} for o_TI {list(o_TI.shape)}")
        if x.device != o_TI.device:
            raise KernelArgumentError(name, f"device {x.device}", f"the device of o_TI, {o_TI.device}")
    if not eps >= 0:
        raise KernelArgumentError("eps", eps, "a number >= 0")
    if (width is None) != (reduce is None):
        raise KernelArgumentError("width", width, "the number of columns of all ranks with reduce, None without")
    if width is not None and width < o_TI.shape[1]:
        raise KernelArgumentError("width", width, f"at least the columns of this rank, {o_TI.shape[1]}")
