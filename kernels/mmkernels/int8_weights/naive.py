"""The definition of products with int8 weights in plain torch: dequantise, then multiply, an expert at a time.

Legend: T tokens, R rows sorted by expert, D and E widths of a product, D model width and F expert width of experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.int8_weights.int8_weight import Int8Weight, dequantise


def naive_int8_linear(x_TD: Tensor, weight_ED: Int8Weight) -> Tensor:
    """``x W^T`` in the dtype of x, [T, E]."""
    return F.linear(x_TD, dequantise(weight_ED, x_TD.dtype))


def naive_grouped_int8_mlp(x_RD: Tensor, w13_E2FD: Int8Weight, w2_EDF: Int8Weight, offset_E: Tensor) -> Tensor:
    """``W2 (SiLU(W1 x) * W3 x)`` of each expert's rows, in the dtype of x; zeros for rows that belong to no expert."""
    ends, outputs = offset_E.tolist(), []
    weights = zip(dequantise(w13_E2FD, x_RD.dtype), dequantise(w2_EDF, x_RD.dtype), strict=True)
    for begin, end, ((w1_FD, w3_FD), w2_DF) in zip([0, *ends], ends, weights, strict=False):
        x = x_RD[begin:end]
        outputs.append((F.silu(x @ w1_FD.T) * (x @ w3_FD.T)) @ w2_DF.T)
    return torch.cat([*outputs, x_RD.new_zeros(x_RD.shape[0] - ends[-1], x_RD.shape[1])])
