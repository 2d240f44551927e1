"""Loading of a model in one pass over its weights: each is read alone, turned into what is served, and dropped.

The host holds one fp32 parameter at a time, the largest of which are a layer's experts. The device holds the model that
is served and, while a parameter is quantised, 16 million elements of it. A model on the CPU has both in one memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.infer.compute_dtype import INT8, cast_for_compute, compute_dtype
from mmtrain.infer.joined_projections import join_projections
from mmtrain.infer.memory import check_room
from mmtrain.infer.quantised.modules import QuantisedModule
from mmtrain.infer.quantised.replace import quantise_model
from mmtrain.model.model import HybridLM

_FP32 = 4


class WeightReader(Protocol):
    """The way to a checkpoint's weights."""

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a whole parameter, fp32, on the host; nothing else holds on to it.

        Raises:
            ConfigError: it cannot be read, or is not a finite number.
        """


def served_model(config: ModelConfig, precision: str, device: torch.device) -> HybridLM:
    """Make the model that is served at a precision, on the meta device: its tensors have their shapes and dtypes.

    Args:
        config: the architecture.
        precision: "fp32", "bf16", "int8" or "int8-g128".
        device: on which it will compute.
    """
    model = meta_model(config)
    if precision in INT8:
        quantise_model(model, INT8[precision])
    cast_for_compute(model, compute_dtype(precision, device))
    return model


def stream_model(config: ModelConfig, read: WeightReader, precision: str, device: torch.device) -> HybridLM:
    """Load a model for a precision, parameter by parameter.

    Args:
        config: the architecture.
        read: called once for each parameter, by its name in the model.
        precision: as :func:`served_model` takes it.
        device: where the model goes.

    Raises:
        ConfigError: there is no room for it, or a weight cannot be read.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}
    model = served_model(config, precision, device)
    on_host = max(map(math.prod, shapes.values())) * _FP32
    check_room(model, device, beside=on_host if device.type == "cpu" else 0)
    model = model.to_empty(device=device)
    join_projections(model)  # while nothing is in them: beside the largest parameter there is room
    for name, shape in shapes.items():
        _take(model, name, read(name, shape))
    return model.eval()


@torch.no_grad()
def _take(model: HybridLM, name: str, weight: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, QuantisedModule):
        module.fill(leaf, weight)
    else:
        module.get_parameter(leaf).copy_(weight)
