"""Initial weights: Xavier with DeepNorm gains, the same to the bit on any layout and device.

Every element is a pure function of (seed, parameter name, index in the full parameter): a shard fills its own part and
needs no other, so a model built on the meta device and sharded is initialised without ever being whole. Renaming a
parameter, or an attribute that holds it, therefore changes the weights that a seed gives; checkpoints key on the names
too.

How a parameter begins is said by the module that has it (`mmtrain.model.initial`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.model.elements import global_index, hash_index, local_part, name_key, pieces, shift_right
from mmtrain.model.initial import Constant, Initial, Uniform, Xavier, XavierQKV


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter (plain or DTensor) and buffer of a HybridLM that has memory.

    Norm weights are 1. Everything else is Xavier-uniform, U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out))
    (MiniMax-01 section 4.2 says Xavier with DeepNorm's factors). The gain is beta for value and output projections and
    feed-forward matrices, as DeepNorm defines, and 1 for queries, keys, gates, router, embedding and head; which
    matrices MiniMax scaled is not stated. Routers' fractions begin even, where they have any: the first step's
    auxiliary loss is its coefficient, without a gradient.

    Raises:
        TypeError: a module does not say how a parameter of its own begins.
    """
    config: ModelConfig = model.config
    initialise_parameters(model, seed)
    for fractions_E in model.buffers():
        fractions_E.fill_(config.top_k / config.num_experts)


@torch.no_grad()
def initialise_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter (plain or DTensor) of any module that has memory, as the modules inside say.

    Raises:
        TypeError: a module does not say how a parameter of its own begins.
    """
    for name, parameter in model.named_parameters():
        initial = _initial(model, name)
        if isinstance(initial, Constant):
            parameter.fill_(initial.value)
        else:
            _fill(parameter, name, seed, initial)


def _initial(model: nn.Module, name: str) -> Initial:
    """Ask the module that has a parameter how it begins."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    initial = getattr(owner, "initial", {}).get(leaf)
    if initial is None:
        raise TypeError(
            f"{name}: {type(owner).__name__}.initial does not say how {leaf} begins (mmtrain.model.initial)"
        )
    return initial


def _fill(parameter: Tensor, name: str, seed: int, initial: Uniform | Xavier | XavierQKV) -> None:
    key = name_key(f"{seed}:{name}")
    for part, start in pieces(*local_part(parameter)):
        index = global_index(part.shape, start, parameter.shape, part.device)
        part.copy_(_uniform(index, key).mul_(initial.bound(index, parameter.shape)))


def _uniform(index: Tensor, key: int) -> Tensor:
    """Return fp32 uniform in (-1, 1), 24 random bits, for each index."""
    bits = shift_right(hash_index(index, key), 40)
    return (bits.float() + 0.5).mul_(2.0**-23).sub_(1.0)
