"""Argument checks of SwiGLU's activation. They run before any work and never wait for a GPU.

Legend: N rows, F inner width; 2F is gate and up side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES
from mmkernels.common.errors import KernelArgumentError


def check_swiglu(gate_up_N2F: Tensor, rows: Tensor | None) -> None:
    """Refuse an input, or a number of rows, that the activation cannot take.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    if not isinstance(gate_up_N2F, Tensor):
        raise KernelArgumentError("gate_up_N2F", type(gate_up_N2F).__name__, "a tensor [..., 2F]")
    if gate_up_N2F.ndim < 2 or gate_up_N2F.shape[-1] % 2:
        raise KernelArgumentError("gate_up_N2F", f"shape {list(gate_up_N2F.shape)}", "[..., 2F], 2 dimensions or more")
    if gate_up_N2F.dtype not in ALL_DTYPES:
        raise KernelArgumentError("gate_up_N2F", f"dtype {gate_up_N2F.dtype}", "bfloat16, float16, float32 or float64")
    if rows is None:
        return
    if not isinstance(rows, Tensor) or rows.dtype != torch.int32 or rows.numel() != 1:
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise KernelArgumentError("rows", got, "an int32 tensor of one element, or None")
    if rows.device != gate_up_N2F.device:
        raise KernelArgumentError("rows", f"device {rows.device}", f"the device of gate_up_N2F, {gate_up_N2F.device}")


def check_swiglu_grad(gate_up_N2F: Tensor, dy_NF: Tensor, rows: Tensor | None) -> None:
    """Refuse an output's gradient that does not belong to the input; errors as above."""
    check_swiglu(gate_up_N2F, rows)
    if not isinstance(dy_NF, Tensor) or gate_up_N2F.ndim != 2 or 2 * dy_NF.numel() != gate_up_N2F.numel():
        got = f"shape {list(dy_NF.shape)}" if isinstance(dy_NF, Tensor) else type(dy_NF).__name__
        raise KernelArgumentError("dy_NF", got, f"[N, F] for an input [N, 2F] of {list(gate_up_N2F.shape)}")
