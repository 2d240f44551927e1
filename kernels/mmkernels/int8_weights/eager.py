"""Products with int8 weights in torch, on any device: some rows of the weight at a time in the activations' dtype.

Legend: T tokens, R rows sorted by expert, D and E widths of a product, C of the E outputs at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.int8_weights.int8_weight import Int8Weight, dequantise, rows
from mmkernels.swiglu import swiglu

ELEMENTS = 1 << 26
"""Elements of a weight that are in the activations' dtype at a time: 128 MiB of bfloat16."""


def int8_linear(x_TD: Tensor, weight_ED: Int8Weight) -> Tensor:
    """``x W^T``, [T, E]."""
    outputs, width = weight_ED.values.shape
    step = max(1, ELEMENTS // max(width, 1))
    if outputs <= step:
        return _product(x_TD, weight_ED)
    parts = (slice(first, first + step) for first in range(0, outputs, step))
    return torch.cat([_product(x_TD, rows(weight_ED, part)) for part in parts], dim=1)


def _product(x_TD: Tensor, weight_CD: Int8Weight) -> Tensor:
    """A scale a row is taken after the product: whole numbers up to 127 are exact in bfloat16, their products with a
    scale are not. A scale a group has to go into the weight, which is rounded to the activations' dtype.
    """
    if weight_CD.scale.shape[-1] == 1:
        return (x_TD @ weight_CD.values.to(x_TD.dtype).t()).mul_(weight_CD.scale[:, 0])
    return x_TD @ dequantise(weight_CD, x_TD.dtype).t()


def grouped_int8_mlp(x_RD: Tensor, w13_E2FD: Int8Weight, w2_EDF: Int8Weight, offset_E: Tensor) -> Tensor:
    """The experts' MLP, [R, D], an expert that has rows after the other."""
    ends, y_RD = offset_E.tolist(), torch.empty_like(x_RD)
    for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if begin < end:
            first = Int8Weight(w13_E2FD.values[e].flatten(0, 1), w13_E2FD.scale[e].flatten(0, 1))
            hidden_CF = swiglu(int8_linear(x_RD[begin:end], first))
            y_RD[begin:end] = int8_linear(hidden_CF, Int8Weight(w2_EDF.values[e], w2_EDF.scale[e]))
    return y_RD
