"""Optimizer state in host memory: DeepSpeed's CPUAdam over the local shards of a sharded model."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class HostAdam(torch.optim.Optimizer):
    """AdamW whose parameters, gradients and moments lie in host memory, where its arithmetic runs.

    FSDP2's CPU offload policy keeps the sharded parameters and gradients there (see `parallel/apply.py`); DeepSpeed's
    vectorised kernel updates each rank's shards. Moments are DTensors like their parameters, so that checkpoints hold
    them as they hold any optimizer's.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        # The C++ operator is built at first use by `ninja`, which pip puts beside the interpreter.
        beside = sysconfig.get_path("scripts")
        if beside not in os.environ.get("PATH", "").split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), beside])
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        self._local = {p: nn.Parameter(_local(p)) for group in self.param_groups for p in group["params"]}
        inner_groups = [{**group, "params": [self._local[p] for p in group["params"]]} for group in self.param_groups]
        self._inner = DeepSpeedCPUAdam(inner_groups, lr=0.0, betas=betas, eps=eps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise NotImplementedError("HostAdam.step takes no closure: AdamW needs one evaluation of the gradient")
        stepped = []
        for group, inner_group in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner_group["lr"] = float(group["lr"])
            stepped += [p for p in group["params"] if p.grad is not None]
        for parameter in stepped:
            self._lend_state(parameter)
        self._inner.step()
        for parameter in stepped:
            self.state[parameter]["step"] += 1
            self._local[parameter].grad = None

    def _lend_state(self, parameter: nn.Parameter) -> None:
        """Give DeepSpeed this rank's shards of the gradient and of the moments, by reference."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        local = self._local[parameter]
        local.grad = _local(parameter.grad)
        self._inner.state[local] = {
            "step": int(state["step"]),
            "exp_avg": _local(state["exp_avg"]),
            "exp_avg_sq": _local(state["exp_avg_sq"]),
        }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, sharing memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
