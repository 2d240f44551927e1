"""Argument checks of the gated norm. They run before any work and never wait for a GPU.

Legend: T rows (tokens), I columns of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.errors import KernelArgumentError

BACKENDS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MAX_WIDTH = 16384
"""Widest row of one program: 32 warps hold 16 columns a thread."""


def check_arguments(
    o_TI: Tensor, gate_TI: Tensor, weight_I: Tensor, eps: float, width: int | None, reduce: object | None
) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    _check_tensor("o_TI", o_TI, 2, (*TRITON_DTYPES, torch.float64))
    if o_TI.shape[1] == 0:
        raise KernelArgumentError("o_TI", f"shape {list(o_TI.shape)}", "at least one column")
    _check_tensor("gate_TI", gate_TI, 2, (o_TI.dtype,))
    _check_tensor("weight_I", weight_I, 1, (torch.float32, o_TI.dtype))
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


def use_triton(backend: str, o_TI: Tensor) -> bool:
    """Whether the call runs on Triton. "auto" takes it for what it can run on a CUDA device.

    Raises:
        KernelArgumentError: the name is unknown, or Triton was asked for and cannot run this call.
    """
    if backend not in BACKENDS:
        raise KernelArgumentError("backend", repr(backend), ", ".join(BACKENDS))
    if backend != "triton":
        fits = o_TI.dtype in TRITON_DTYPES and o_TI.shape[1] <= TRITON_MAX_WIDTH
        return backend == "auto" and o_TI.is_cuda and fits
    from mmkernels.triton_support import check_device  # only this path needs Triton

    check_device("o_TI", o_TI)
    if o_TI.dtype not in TRITON_DTYPES:
        raise KernelArgumentError("o_TI", f"dtype {o_TI.dtype}", "float32, bfloat16 or float16 with backend='triton'")
    if o_TI.shape[1] > TRITON_MAX_WIDTH:
        raise KernelArgumentError("o_TI", f"{o_TI.shape[1]} columns", f"{TRITON_MAX_WIDTH} with backend='triton'")
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
