"""AdamW over sharded fp32 master weights, from torch, NVIDIA's apex or DeepSpeed."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor, nn

from mmtrain.config import OptimConfig
from mmtrain.errors import ConfigError
from mmtrain.optim.local_adamw import LocalAdamW
from mmtrain.optim.shard_adam import fused_adam, host_adam
from mmtrain.parallel.gradients import by_mesh


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
                          "pip install deepspeed ninja, or use optim=adamw")  # fmt: skip


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build AdamW with the paper's betas and decay (MiniMax-01 section 4.2); norms are not decayed unless asked.

    Parameters that want no gradient are left out: they have no state, and are neither updated nor decayed. A rank of a
    pipeline may have nothing else.
    """
    groups = _parameter_groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.name == "apex":
        return fused_adam(groups, betas, config.eps)
    if config.name == "cpu_offload":
        return host_adam(groups, betas, config.eps)
    return LocalAdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def _parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Split parameters into groups by weight decay and by mesh: one fused update takes DTensors of one mesh."""
    groups: list[dict] = []
    for parameters in by_mesh(p for p in model.parameters() if p.requires_grad):
        decayed = [p for p in parameters if config.decay_norms or p.ndim > 1]
        plain = [p for p in parameters if not (config.decay_norms or p.ndim > 1)]
        groups += [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]] or [{"params": [], "weight_decay": 0.0}]


def update(optimizer: torch.optim.Optimizer, lr: float, skipped: Tensor) -> None:
    """Update the weights, unless the step is skipped: then neither weights nor moments nor their steps change.

    torch's fused AdamW reads `skipped` on the device, as it does for torch's own GradScaler, and nothing waits.

    Args:
        optimizer: of :func:`build_optimizer`.
        lr: learning rate of the step.
        skipped: bool scalar on the device, the same on all ranks.
    """
    set_lr(optimizer, lr)
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
