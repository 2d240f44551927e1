"""Argument checks of both norms. They run before any work and never wait for a GPU.

Legend: T rows (tokens), D columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.errors import KernelArgumentError

BACKENDS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MAX_WIDTH = 16384
"""Widest row of one program: 32 warps hold 16 columns a thread."""


def check_arguments(x_TD: Tensor, y_TD: Tensor | None, alpha: float, weight_D: Tensor, eps: float) -> None:
    """Refuse arguments that do not fit together; ``y_TD`` None when there is no sum.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    _check_tensor("x_TD", x_TD, 2, (*TRITON_DTYPES, torch.float64))
    if x_TD.shape[1] == 0:
        raise KernelArgumentError("x_TD", f"shape {list(x_TD.shape)}", "at least one column")
    others = [("weight_D", weight_D, x_TD.shape[1:], (torch.float32, x_TD.dtype))]
    if y_TD is not None:
        others.append(("y_TD", y_TD, x_TD.shape, (x_TD.dtype,)))
    for name, x, shape, dtypes in others:
        _check_tensor(name, x, len(shape), dtypes)
        if x.shape != shape:
            raise KernelArgumentError(name, f"shape {list(x.shape)}", f"{list(shape)} for x_TD {list(x_TD.shape)}")
        if x.device != x_TD.device:
            raise KernelArgumentError(name, f"device {x.device}", f"the device of x_TD, {x_TD.device}")
    if not eps >= 0:
        raise KernelArgumentError("eps", eps, "a number >= 0")
    if not math.isfinite(alpha):
        raise KernelArgumentError("alpha", alpha, "a finite number")


def use_triton(backend: str, x_TD: Tensor) -> bool:
    """Whether the call runs on Triton. "auto" takes it for what it can run on a CUDA device.

    Raises:
        KernelArgumentError: the name is unknown, or Triton was asked for and cannot run this call.
    """
    if backend not in BACKENDS:
        raise KernelArgumentError("backend", repr(backend), ", ".join(BACKENDS))
    if backend != "triton":
        fits = x_TD.dtype in TRITON_DTYPES and x_TD.shape[1] <= TRITON_MAX_WIDTH
        return backend == "auto" and x_TD.is_cuda and fits
    from mmkernels.triton_support import check_device  # only this path needs Triton

    check_device("x_TD", x_TD)
    if x_TD.dtype not in TRITON_DTYPES:
        raise KernelArgumentError("x_TD", f"dtype {x_TD.dtype}", "float32, bfloat16 or float16 with backend='triton'")
    if x_TD.shape[1] > TRITON_MAX_WIDTH:
        raise KernelArgumentError("x_TD", f"{x_TD.shape[1]} columns", f"{TRITON_MAX_WIDTH} with backend='triton'")
    return True


def _check_tensor(name: str, x: object, ndim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise KernelArgumentError(name, type(x).__name__, f"a tensor of {ndim} dimensions")
    if x.ndim != ndim:
        raise KernelArgumentError(name, f"shape {list(x.shape)}", f"{ndim} dimensions")
    if x.dtype not in dtypes:
        raise KernelArgumentError(name, f"dtype {x.dtype}", " or ".join(str(dtype) for dtype in dtypes))
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise KernelArgumentError(name, f"strides {list(x.stride())}", "a contiguous last dimension (stride 1)")
