"""The public functions of SwiGLU's activation: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.swiglu.checks import check_swiglu, check_swiglu_grad
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
    check_swiglu(gate_up_N2F, rows)
    if backend == "naive":
        return naive_swiglu(gate_up_N2F, rows)
    flat_N2F = gate_up_N2F.reshape(-1, gate_up_N2F.shape[-1]) if gate_up_N2F.numel() else gate_up_N2F.flatten(0, -2)
    if use_triton(backend, "gate_up_N2F", gate_up_N2F, others=OTHERS):
        from mmkernels.swiglu.launch import triton_swiglu

        y_NF = triton_swiglu(flat_N2F, rows)
    else:
        y_NF = eager_swiglu(flat_N2F, rows)
    return y_NF.view(*gate_up_N2F.shape[:-1], y_NF.shape[-1])


def swiglu_grad(
    gate_up_N2F: Tensor, dy_NF: Tensor, rows: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The gradient of :func:`swiglu`, and its output once more, for a caller that saved neither output nor graph.

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
    check_swiglu_grad(gate_up_N2F, dy_NF, rows)
    if use_triton(backend, "gate_up_N2F", gate_up_N2F, others=("eager",)):
        from mmkernels.swiglu.launch import triton_swiglu_grad

        return triton_swiglu_grad(gate_up_N2F, dy_NF, rows, with_output=True)
    return eager_swiglu_grad(gate_up_N2F, dy_NF, gate_up_N2F.shape[0] if rows is None else int(rows), with_output=True)
