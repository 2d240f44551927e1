"""Fingerprints of gradients: a norm and a few projections that tell differences without gathering anything.

A projection is the sum of a gradient's elements with signs that hash the parameter's name and the element's index in
the full parameter. Shards' projections add up, so each rank sums its own and one all-reduce of 17 numbers a parameter
does the rest, on any layout. The root mean square difference of two gradients' projections is the norm of the
gradients' difference, to within 18% (one standard deviation of 16 projections).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmtrain.build import meta_model
from mmtrain.model.elements import global_index, hash_index, local_part, name_key, pieces
from mmtrain.model.model import HybridLM

PROJECTIONS = 16


@torch.no_grad()
def gradient_fingerprints(model: HybridLM, device: torch.device) -> dict[str, list[float]]:
    """Fingerprint the gradient of every parameter of the whole model. Collective; waits for the device.

    Args:
        model: this rank's part, with reduced gradients; one without a gradient counts as zeros.
        device: where the gradients lie.

    Returns:
        By the parameter's name: norm, then PROJECTIONS projections, all from float64 sums.
    """
    names = [name for name, _ in meta_model(model.config).named_parameters()]
    here = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    zeros = torch.zeros(1 + PROJECTIONS, dtype=torch.float64, device=device)
    sums = torch.stack([_local_sums(here[name], name) if name in here else zeros for name in names])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return {name: [math.sqrt(square), *rest] for name, (square, *rest) in zip(names, sums.tolist(), strict=True)}


def _local_sums(gradient: Tensor, name: str) -> Tensor:
    """Sum of squares and projections of the part that lies here, times this copy's weight."""
    key, sums = name_key(name), []
    for part, start in pieces(*local_part(gradient)):
        wide, bits = part.double(), hash_index(global_index(part.shape, start, gradient.shape, part.device), key)
        total = wide.sum()
        negative = [(wide * ((bits >> number) & 1)).sum() for number in range(PROJECTIONS)]
        sums.append(torch.stack([wide.square().sum(), *(total - 2 * part_sum for part_sum in negative)]))
    if not sums:
        return torch.zeros(1 + PROJECTIONS, dtype=torch.float64, device=gradient.device)
    return torch.stack(sums).sum(0) * _copy_weight(gradient)


def _copy_weight(gradient: Tensor) -> float:
    """The weight of this rank's copy of what several ranks hold alike.

    Weights of all copies sum to 1, and no two are equal: copies that differ change the result, whatever their mean.
    """
    if not isinstance(gradient, DTensor):
        return 1.0
    mesh, copy, copies = gradient.device_mesh, 0, 1
    for axis, placement in enumerate(gradient.placements):
        if placement.is_replicate():
            copy, copies = copy * mesh.size(axis) + mesh.get_local_rank(axis), copies * mesh.size(axis)
    return 2 * (copy + 1) / (copies * (copies + 1))
