"""The question that every Triton backend asks first: whether a kernel can run on a tensor here."""

from __future__ import annotations

import triton
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter (`TRITON_INTERPRET=1` when this was imported): on CPU tensors, slowly."""


def check_device(name: str, x: Tensor) -> None:
    """Refuse a tensor that a Triton kernel cannot reach.

    Raises:
        KernelArgumentError: the tensor lies on a device that is neither CUDA nor, under the interpreter, the CPU.
    """
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        raise KernelArgumentError(name, f"device {x.device}", "a CUDA device (or TRITON_INTERPRET=1 and the CPU)")
