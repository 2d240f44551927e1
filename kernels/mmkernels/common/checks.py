"""Checks that several ops share. They run before any work and never wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_DTYPES = (*TRITON_DTYPES, torch.float64)
ROW_MAX_WIDTH = 16384
"""Widest row that one program of the norms' kernels holds: 32 warps with 16 columns a thread."""


def check_kind(name: str, x: object, ndim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse an argument that is no tensor of these dimensions and dtypes.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    if not isinstance(x, Tensor):
        raise KernelArgumentError(name, type(x).__name__, f"a tensor of {ndim} dimensions")
    if x.ndim != ndim:
        raise KernelArgumentError(name, f"shape {list(x.shape)}", f"{ndim} dimensions")
    if x.dtype not in dtypes:
        raise KernelArgumentError(name, f"dtype {x.dtype}", " or ".join(str(dtype) for dtype in dtypes))


def check_tensor(name: str, x: object, ndim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what :func:`check_kind` does, and a last dimension that is not contiguous."""
    check_kind(name, x, ndim, dtypes)
    assert isinstance(x, Tensor)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise KernelArgumentError(name, f"strides {list(x.stride())}", "a contiguous last dimension (stride 1)")


def check_matrix(name: str, x: object, layout: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse an argument that is no matrix of these dtypes; `layout` names its dimensions ("[T, D]") for the message.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    if not isinstance(x, Tensor):
        raise KernelArgumentError(name, type(x).__name__, f"a tensor {layout}")
    if x.ndim != 2:
        raise KernelArgumentError(name, f"shape {list(x.shape)}", f"2 dimensions {layout}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelArgumentError(name, f"dtype {x.dtype}", names)


def check_beside(
    name: str, x: object, shape: torch.Size, dtypes: tuple[torch.dtype, ...], like_name: str, like: Tensor
) -> None:
    """Refuse a tensor that is not of this shape and on the device of another argument, or whose rows have gaps.

    Args:
        name: the argument's name.
        x: the argument.
        shape: what it has to be, which follows from the other argument.
        dtypes: the dtypes that are allowed.
        like_name: the other argument's name.
        like: the other argument.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_tensor(name, x, len(shape), dtypes)
    assert isinstance(x, Tensor)
    if x.shape != shape:
        raise KernelArgumentError(name, f"shape {list(x.shape)}", f"{list(shape)} for {like_name} {list(like.shape)}")
    if x.device != like.device:
        raise KernelArgumentError(name, f"device {x.device}", f"the device of {like_name}, {like.device}")


def use_triton(
    backend: str, name: str, x: Tensor, max_width: int | None = None, others: tuple[str, ...] = ("torch",)
) -> bool:
    """Whether a call runs on Triton: if it is asked for, or by "auto" on CUDA where the kernel can take the tensor.

    Args:
        backend: "auto", "triton" or one of ``others``.
        name: what the public function calls ``x``.
        x: the tensor that decides.
        max_width: the widest last dimension that the kernel takes.
        others: names of the paths without Triton.

    Raises:
        KernelArgumentError: the backend is unknown, or Triton was asked for and cannot run this call.
    """
    if backend not in ("auto", "triton", *others):
        raise KernelArgumentError("backend", repr(backend), ", ".join(("auto", "triton", *others)))
    fits = x.dtype in TRITON_DTYPES and (max_width is None or x.shape[-1] <= max_width)
    if backend != "triton":
        return backend == "auto" and x.is_cuda and fits
    if x.dtype not in TRITON_DTYPES:
        raise KernelArgumentError(name, f"dtype {x.dtype}", "float32, bfloat16 or float16 with backend='triton'")
    if not fits:
        raise KernelArgumentError(name, f"{x.shape[-1]} columns", f"{max_width} with backend='triton'")
    from mmkernels.common.triton_support import check_device  # Triton does not exist on every platform that has torch

    check_device(name, x)
    return True
