"""Copies of a parameter on several ranks, which must hold the same bits: a device that computes wrong is found by them.

Norms and routers, say, lie on every rank of tensor parallelism. All get the same gradient and update it alike, so that
one bit that differs is a fault of a machine.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, and its bits look random: places count, not values alone


def copies(model: nn.Module) -> Iterator[tuple[DeviceMesh, int, list[tuple[str, Tensor]]]]:
    """Yield each axis of each mesh along which parameters have copies, and this rank's, by name."""
    found: dict[tuple[DeviceMesh, int], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            for axis, placement in enumerate(parameter.placements):
                if placement.is_replicate() and mesh.size(axis) > 1:
                    found.setdefault((mesh, axis), []).append((name, parameter.to_local()))
    for (mesh, axis), some in found.items():
        yield mesh, axis, some


class OddCopy(NamedTuple):
    """A rank whose copy of a parameter is not what most have.

    Attributes:
        rank: which.
        host: its machine.
        name: of the first such parameter.
    """

    rank: int
    host: str
    name: str


@torch.no_grad()
def odd_copies(model: nn.Module) -> list[OddCopy]:
    """Return the ranks whose copy of a parameter is not what most have. Collective; all get the same.

    Where two copies differ there is no majority, and both ranks are named.
    """
    device = next(model.parameters()).device
    mine: str | None = None
    for mesh, axis, some in copies(model):
        sums_P = torch.stack([bit_sum(local) for _, local in some])
        gathered = [torch.empty_like(sums_P) for _ in range(mesh.size(axis))]
        dist.all_gather(gathered, sums_P, group=mesh.get_group(axis))
        here = mesh.get_local_rank(axis)
        for (name, _), row in zip(some, torch.stack(gathered, dim=1).tolist(), strict=True):
            if mine is None and here in _minority(row):
                mine = name
    count = torch.tensor(int(mine is not None), device=device)
    if dist.is_initialized():
        dist.all_reduce(count)
    if int(count) == 0:
        return []
    everyone: list[OddCopy | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine and OddCopy(dist.get_rank(), socket.gethostname(), mine))
    return [one for one in everyone if one is not None]


def bit_sum(x: Tensor) -> Tensor:
    """Return a checksum of all bits, an int64 scalar on the device: of every place and value, modulo 2^64."""
    words = x.contiguous().view(torch.uint8).view(-1)
    words = words.view(torch.int32) if words.numel() % 4 == 0 else words
    places = torch.arange(1, words.numel() + 1, device=x.device) * MULTIPLIER
    mixed = (words.to(torch.int64) ^ places) * MULTIPLIER
    return (mixed ^ (mixed >> 29)).sum()


def _minority(values: Iterable[int]) -> list[int]:
    """Return the places of the values that are not the most frequent one; of all, if two are equally frequent."""
    values = list(values)
    ranked = Counter(values).most_common(2)
    if len(ranked) == 1:
        return []
    if ranked[0][1] == ranked[1][1]:
        return list(range(len(values)))
    return [i for i, value in enumerate(values) if value != ranked[0][0]]
