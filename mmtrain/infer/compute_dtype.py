"""Type that a model computes in when it is served: as in training, weights but the routers' are cast to it."""

from __future__ import annotations

import torch
from torch import nn

from mmtrain.model.moe.router import Router

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
INT8 = {"int8": False, "int8-g128": True}
"""Precisions whose projections and experts are int8, and whether groups of 128 columns have scales of their own."""


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations, keys and all weights that are not int8, at a precision.

    Beside int8 weights it is bf16 on a GPU. On a CPU, whose products in bf16 are slow or emulated, it is fp32.

    Args:
        precision: a key of :data:`PRECISIONS` or :data:`INT8`.
        device: on which it is computed.
    """
    if precision in INT8:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return PRECISIONS[precision]


@torch.no_grad()
def cast_for_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters of a model in place, but those of routers, whose choices are made in fp32.

    So does training under `optim.precision`, with copies of its fp32 masters.

    Args:
        model: loaded, on its device.
        dtype: to compute in.
    """
    for module in model.modules():
        if not isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
