"""Gradients of a laid-out model: their global norm, and clipping by it, over parameters on several meshes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmtrain.model.packed_seq import to_device
from mmtrain.parallel.dtensor_params import local_tensor


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters apart by the mesh they lie on: experts lie on another than the rest."""
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(found.values())


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, flags: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale gradients so that their global norm (over all ranks and parameters) is at most `max_norm`.

    Squares are summed in float64: torch's fp32 norm of a million elements is off by 1e-5 on CPU, by another amount for
    each way of sharding, and a norm that depends on the layout makes training depend on it.

    Args:
        parameters: at least one; those that have gradients are looked at, which may be none on a rank whose layers
            are frozen.
        max_norm: None only measures.
        flags: float64 [n], whatever the ranks must agree on before they update; summed over all ranks in the norm's
            own all-reduce.

    Returns:
        The norm before clipping, float64 scalar, the same on every rank; and the summed flags.
    """
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares, local = _squares(grads) if grads else (local_tensor(parameters[0]).new_zeros((), dtype=torch.float64), [])
    sums = torch.cat([squares[None], squares.new_empty(0) if flags is None else flags])
    if isinstance(grads[0], DTensor) if grads else dist.is_initialized():
        dist.all_reduce(sums)
    norm = sums[0].sqrt()
    if max_norm is not None and local:
        # As torch.nn.utils.clip_grads_with_norm_, on plain tensors: DTensors' dispatcher takes milliseconds of a step.
        torch._foreach_mul_(local, (max_norm / (norm.float() + 1e-6)).clamp(max=1.0))
    return norm, sums[1:]


def _squares(gradients: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """This rank's share of the sum of squares, where what several ranks hold alike counts once; and its gradients."""
    local, share = [], []
    for gradient in gradients:
        copies = 1
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            copies = math.prod(mesh.size(i) for i, p in enumerate(gradient.placements) if p.is_replicate())
            gradient = gradient.to_local()
        local.append(gradient)
        share.append(1 / copies)
    squares = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float64)).square()
    if any(part != 1 for part in share):
        squares *= to_device(torch.tensor(share, dtype=torch.float64), squares.device)
    return squares.sum(), local


@torch.no_grad()
def all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether no parameter of any rank is infinite or not a number. Collective; waits for the device."""
    local = [local_tensor(parameter) for parameter in parameters]
    bad = torch.zeros((), dtype=torch.int64, device=local[0].device)
    if here := [part for part in local if part.numel()]:
        largest = torch.stack(torch._foreach_norm(here, math.inf))  # of magnitudes: NaN where any element is
        bad += (~largest.isfinite()).sum()
    if dist.is_initialized():
        dist.all_reduce(bad)
    return int(bad) == 0
