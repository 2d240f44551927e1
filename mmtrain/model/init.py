"""Initial weights: Xavier with DeepNorm gains, the same to the bit on any layout and device.

Every element is a pure function of (seed, parameter name, index in the full parameter): a shard fills its own part and
needs no other, so a model built on the meta device and sharded is initialised without ever being whole. Renaming a
parameter, or an attribute that holds it, therefore changes the weights that a seed gives; checkpoints key on the names
too.

How a parameter begins is said by the module that has it (`mmtrain.model.initial`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mmtrain.config import ModelConfig
from mmtrain.model.initial import Constant, Initial, Xavier, XavierQKV

_CHUNK = 1 << 22  # elements filled at once; bounds the int64 scratch to 32 MiB a buffer


def build_model(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 1234) -> nn.Module:
    """Make a model with initial weights, whole, on one device, in fp32 (for tests, tools and decoding)."""
    model = meta_model(config).to_empty(device=device)
    initialise(model, seed)
    return model


def meta_model(config: ModelConfig) -> nn.Module:
    """Make a model without memory, to be sharded, given memory, and filled by :func:`initialise` or a checkpoint."""
    from mmtrain.model.model import HybridLM

    with torch.device("meta"):
        return HybridLM(config)


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
    for name, parameter in model.named_parameters():
        initial = _initial(model, name)
        if isinstance(initial, Constant):
            parameter.fill_(initial.value)
        else:
            _fill(parameter, name, seed, initial)
    for fractions_E in model.buffers():
        fractions_E.fill_(config.top_k / config.num_experts)


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


def _fill(parameter: Tensor, name: str, seed: int, initial: Xavier | XavierQKV) -> None:
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        local = parameter.to_local()
    else:
        local, offset = parameter, (0,) * parameter.ndim
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little", signed=True)
    for part, start in _pieces(local, offset):
        index = _global_index(part.shape, start, parameter.shape, part.device)
        part.copy_(_uniform(index, key).mul_(initial.bound(index, parameter.shape)))


def _pieces(local: Tensor, offset: tuple[int, ...]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Yield views of at most _CHUNK elements that make up a shard, each with its offset in the full parameter."""
    if local.numel() <= _CHUNK:
        if local.numel():
            yield local, offset
        return
    dim = next(d for d, size in enumerate(local.shape) if size > 1)
    step = max(1, _CHUNK * local.shape[dim] // local.numel())
    for start, part in zip(range(0, local.shape[dim], step), local.split(step, dim), strict=True):
        yield from _pieces(part, (*offset[:dim], offset[dim] + start, *offset[dim + 1 :]))


def _global_index(shape: torch.Size, offset: tuple[int, ...], full: torch.Size, device: torch.device) -> Tensor:
    """Return the index of each element of a part in the flattened full parameter, int64."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, start, whole in zip(shape, offset, full, strict=True):
        index = index[..., None] * whole + torch.arange(start, start + size, device=device)
    return index


def _uniform(index: Tensor, key: int) -> Tensor:
    """Return fp32 uniform in (-1, 1), 24 random bits, from a 64-bit mix of key and index (SplitMix64's finaliser)."""
    z = index * -7046029254386353131 + key  # 0x9E3779B97F4A7C15, wrapping
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    bits = _shift(z ^ _shift(z, 31), 40)
    return (bits.float() + 0.5).mul_(2.0**-23).sub_(1.0)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
