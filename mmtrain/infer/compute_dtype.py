"""Type that a model computes in when it is served: as in training, weights but the routers' are cast to it."""

from __future__ import annotations

import torch
from torch import nn

from mmtrain.model.moe.router import Router

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
