"""The public function of SwiGLU's activation: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, use_triton
from mmkernels.common.errors import KernelArgumentError
from mmkernels.swiglu.eager import eager_swiglu, eager_swiglu_grad
from mmkernels.swiglu.naive import naive_swiglu

OTHERS = ("eager", "naive")


def swiglu(gate_up_N2F: Tensor, rows: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """SiLU(gate) * up of the two halves of the last dimension. Saves its input alone for the backward.

    Args:
        gate_up_N2F: gate and up side by side, [..., 2F], bfloat16, float16 or float32 (float64 too without the
            kernel). The kernel computes in fp32 and rounds once.
        rows: int32, one element, on the same device: rows (of all leading dimensions flattened) that matter. Later
            ones are not read, in forward or backward, and come out as zeros. None means all.
        backend: "auto" (the kernel on CUDA, else "eager"), "triton", "eager" (torch) or "naive" (plain autograd).

    Returns:
        [..., F] in the dtype of the input.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    _check(gate_up_N2F, rows)
    if backend == "naive":
        return naive_swiglu(gate_up_N2F, rows)
    flat_N2F = gate_up_N2F.reshape(-1, gate_up_N2F.shape[-1]) if gate_up_N2F.numel() else gate_up_N2F.flatten(0, -2)
    if use_triton(backend, "gate_up_N2F", gate_up_N2F, others=OTHERS):
        from mmkernels.swiglu.fused import triton_swiglu

        y_NF = triton_swiglu(flat_N2F, rows)
    else:
        y_NF = eager_swiglu(flat_N2F, rows)
    return y_NF.view(*gate_up_N2F.shape[:-1], y_NF.shape[-1])


def swiglu_grad(
    gate_up_N2F: Tensor, dy_NF: Tensor, rows: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The gradient of :func:`swiglu`, and its output once more: for who saved neither that nor its graph.

    Args:
        gate_up_N2F: the input [N, 2F].
        dy_NF: gradient of the output [N, F], same dtype.
        rows: as for :func:`swiglu`; the results' later rows are zeros.
        backend: "auto" (the kernel on CUDA, else "eager"), "triton" or "eager".

    Returns:
        Gradient of the input [N, 2F], and the output [N, F].

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    _check(gate_up_N2F, rows)
    if not isinstance(dy_NF, Tensor) or gate_up_N2F.ndim != 2 or 2 * dy_NF.numel() != gate_up_N2F.numel():
        got = f"shape {list(dy_NF.shape)}" if isinstance(dy_NF, Tensor) else type(dy_NF).__name__
        raise KernelArgumentError("dy_NF", got, f"[N, F] for an input [N, 2F] of {list(gate_up_N2F.shape)}")
    if use_triton(backend, "gate_up_N2F", gate_up_N2F, others=("eager",)):
        from mmkernels.swiglu.fused import triton_swiglu_grad

        return triton_swiglu_grad(gate_up_N2F, dy_NF, rows, with_output=True)
    return eager_swiglu_grad(gate_up_N2F, dy_NF, gate_up_N2F.shape[0] if rows is None else int(rows), with_output=True)


def _check(gate_up_N2F: Tensor, rows: Tensor | None) -> None:
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
