"""The public products with int8 weights: checks and dispatch. There are no gradients.

Legend: T tokens, D and E widths of a projection; R rows sorted by expert, E experts, D model width, F expert width.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.int8_weights import eager
from mmkernels.int8_weights.checks import check_linear, check_mlp
from mmkernels.int8_weights.int8_weight import Int8Weight
from mmkernels.int8_weights.naive import naive_grouped_int8_mlp, naive_int8_linear
from mmkernels.swiglu import swiglu

OTHERS = ("eager", "naive")
OTHERS_LINEAR = (*OTHERS, "dequantise")
DEQUANTISE_FROM = 512
"""Tokens from which "auto" on CUDA turns the weight into the activations' dtype first and takes torch's product. That
writes and reads 2 bytes a weight more. On an H200 (12288 x 4096) the kernel took 0.050 ms for 64 tokens and 1.01 ms for
4,096, torch's product of bfloat16 0.037 and 0.59; the weight's bytes take 0.04: between them lie 400 tokens or so.
Reckoned from these; `kernels/bench/gpu/int8_shapes.py` measures it."""


def int8_linear(x_TD: Tensor, weight_ED: Int8Weight, *, backend: str = "auto") -> Tensor:
    """The projection ``x W^T`` with W in int8, dequantised inside the product, summed in fp32.

    Args:
        x_TD: tokens, [T, D], bfloat16 or float32 (float64 too without the kernel).
        weight_ED: [E, D], as :func:`~mmkernels.int8_weights.quantise` makes it. Its rows may be a slice of more, its
            columns too.
        backend: "auto" (on CUDA the kernel, and for many tokens "dequantise"; else "eager"), "triton", "dequantise"
            (a kernel that turns the weight into the dtype of x, and torch's product), "eager" (torch) or "naive".

    Returns:
        [T, E] in the dtype of x.

    Raises:
        KernelArgumentError: an argument does not fit, or wants a gradient; the message names it and what is allowed.
    """
    check_linear(x_TD, weight_ED)
    if backend == "naive":
        return naive_int8_linear(x_TD, weight_ED)
    many = backend == "dequantise"
    if use_triton("triton" if many else backend, "x_TD", x_TD, others=OTHERS_LINEAR):
        from mmkernels.int8_weights.launch import dequantised_product, row_product, triton_product

        if many or (backend == "auto" and x_TD.shape[0] >= DEQUANTISE_FROM):
            return dequantised_product(x_TD, weight_ED)
        return (row_product if x_TD.shape[0] == 1 else triton_product)(x_TD, weight_ED)
    return eager.int8_linear(x_TD, weight_ED)


def grouped_int8_mlp(
    x_RD: Tensor, w13_E2FD: Int8Weight, w2_EDF: Int8Weight, offset_E: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Each expert's SwiGLU MLP of its own rows, as ``mmkernels.grouped_mlp`` has it, with weights in int8.

    Args:
        x_RD: tokens, [R, D], as for :func:`int8_linear`; the rows of expert e end before ``offset_E[e]``. Rows from
            ``offset_E[-1]`` on belong to no expert and may hold anything.
        w13_E2FD: gate and up weights, [E, 2, F, D].
        w2_EDF: down weights, [E, D, F].
        offset_E: int32 [E], the row after each expert's last; equal to the one before for an expert without rows.
        backend: "auto" (the kernel on CUDA, else "eager"), "triton", "eager" (an expert at a time; the host reads the
            offsets) or "naive".

    Returns:
        [R, D] in the dtype of x. Rows that belong to no expert are unwritten: whoever reads it must skip them.

    Raises:
        KernelArgumentError: an argument does not fit, or wants a gradient; the message names it and what is allowed.
    """
    check_mlp(x_RD, w13_E2FD, w2_EDF, offset_E)
    if backend == "naive":
        return naive_grouped_int8_mlp(x_RD, w13_E2FD, w2_EDF, offset_E)
    if use_triton(backend, "x_RD", x_RD, others=OTHERS):
        from mmkernels.int8_weights.launch import triton_product

        first = Int8Weight(w13_E2FD.values.flatten(1, 2), w13_E2FD.scale.flatten(1, 2))
        hidden_RF = swiglu(triton_product(x_RD, first, offset_E), offset_E[-1:], backend=backend)
        return triton_product(hidden_RF, w2_EDF, offset_E)
    return eager.grouped_int8_mlp(x_RD, w13_E2FD, w2_EDF, offset_E)
