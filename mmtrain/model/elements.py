"""Numbers and hashes of the elements of a parameter that a shard holds, the same on any layout and device.

Both are functions of the parameter's name and the element's index in the full parameter, so shards need no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

CHUNK = 1 << 22  # elements taken at once; bounds int64 scratch to 32 MiB a buffer


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the part of a plain tensor or DTensor that lies here, and its offset in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def pieces(local: Tensor, offset: tuple[int, ...]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Yield views of at most CHUNK elements that make up a shard, each with its offset in the full parameter."""
    if local.numel() <= CHUNK:
        if local.numel():
            yield local, offset
        return
    dim = next(d for d, size in enumerate(local.shape) if size > 1)
    step = max(1, CHUNK * local.shape[dim] // local.numel())
    for start, part in zip(range(0, local.shape[dim], step), local.split(step, dim), strict=True):
        yield from pieces(part, (*offset[:dim], offset[dim] + start, *offset[dim + 1 :]))


def global_index(shape: torch.Size, offset: tuple[int, ...], full: torch.Size, device: torch.device) -> Tensor:
    """Return the index of each element of a part in the flattened full parameter, int64."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, start, whole in zip(shape, offset, full, strict=True):
        index = index[..., None] * whole + torch.arange(start, start + size, device=device)
    return index


def name_key(text: str) -> int:
    """Return 64 bits, as a signed number, that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def hash_index(index: Tensor, key: int) -> Tensor:
    """Return 64 random bits for each int64 index, as int64: a mix of key and index (SplitMix64's finaliser)."""
    z = index * -7046029254386353131 + key  # 0x9E3779B97F4A7C15, wrapping
    z = (z ^ shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ shift_right(z, 31)


def shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right, filling with zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
