"""AdamW over sharded fp32 master weights, from torch, NVIDIA's apex or DeepSpeed."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mmtrain.config import OptimConfig
from mmtrain.errors import ConfigError
from mmtrain.optim.shard_adam import fused_adam, host_adam


def check_optimizer(config: OptimConfig, device_type: str) -> None:
    """Refuse an optimizer that this machine cannot run, before anything is started.

    The package called `apex` on PyPI is something else, so NVIDIA's is told by `apex.optimizers.FusedAdam`.

    Raises:
        ConfigError: the package is missing, is another one, or the device does not fit.
    """
    if config.name == "apex":
        try:
            found = hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
        except ImportError:
            found = False
        if not found:
            raise ConfigError("optim.name", "apex", "NVIDIA's apex (apex.optimizers.FusedAdam) is not installed",
                              "build it from NVIDIA's source, or use optim=adamw")  # fmt: skip
        if device_type != "cuda":
            raise ConfigError("optim.name", "apex", "FusedAdam needs CUDA tensors", "use optim=adamw here")
    if config.name == "cpu_offload" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("optim.name", "cpu_offload", "deepspeed is not installed",
                          "pip install 'mmtrain[offload]', or use optim=adamw")  # fmt: skip


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build AdamW with the paper's betas and decay (MiniMax-01 section 4.2); norms are not decayed unless asked."""
    groups = _parameter_groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.name == "apex":
        return fused_adam(groups, betas, config.eps)
    if config.name == "cpu_offload":
        return host_adam(groups, betas, config.eps)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def _parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Split parameters into groups by weight decay and by mesh: one fused update takes DTensors of one mesh."""
    groups: list[dict] = []
    for parameters in by_mesh(model.parameters()):
        decayed = [p for p in parameters if config.decay_norms or p.ndim > 1]
        plain = [p for p in parameters if not (config.decay_norms or p.ndim > 1)]
        groups += [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters by the device mesh that they lie on: experts lie on another mesh than the rest."""
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(found.values())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale gradients so that their global norm (over all ranks and parameters) is at most `max_norm`.

    Squares are summed in float64: torch's fp32 norm of a million elements is off by 1e-5 on CPU, by another amount for
    each way of sharding, and a norm that depends on the layout makes training depend on it.

    Returns:
        The norm before clipping, float64 scalar, the same on every rank; with None it is only measured.
    """
    chosen = by_mesh(parameter for parameter in parameters if parameter.grad is not None)
    squares = torch.stack([_squares(parameter.grad for parameter in some) for some in chosen]).sum()
    if isinstance(chosen[0][0], DTensor):
        dist.all_reduce(squares)
    norm = squares.sqrt()
    for some in chosen:
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(some, max_norm, norm.float())
    return norm


def _squares(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum the squares of this rank's part of gradients; an element that n ranks hold counts 1/n on each of them."""
    local, share = [], []
    for gradient in gradients:
        copies = 1
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            copies = math.prod(mesh.size(i) for i, p in enumerate(gradient.placements) if p.is_replicate())
            gradient = gradient.to_local()
        local.append(gradient)
        share.append(1 / copies)
    norms = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float64))
    return (norms.square() * norms.new_tensor(share)).sum()
