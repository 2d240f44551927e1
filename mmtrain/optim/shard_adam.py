"""AdamW by the raw kernels of other packages (DeepSpeed's on the CPU, apex's on the GPU) over a model's shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmtrain.optim.host_kernel import load_host_adam
from mmtrain.parallel.dtensor_params import local_tensor


class ShardAdam(torch.optim.Optimizer):
    """AdamW whose arithmetic an inner optimizer does on each rank's plain tensors: raw kernels know no DTensor.

    Moments are kept here as DTensors like their parameters, so that checkpoints hold them as they hold any optimizer's;
    the inner optimizer gets this rank's shards of weights, gradients and moments by reference.

    Args:
        groups: parameter groups with their `weight_decay`.
        make: builds the inner optimizer from groups of plain parameters; it keeps `exp_avg` and `exp_avg_sq` for each,
            and counts steps in `state["step"]` (DeepSpeed) or `group["step"]` (apex).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._local = {p: nn.Parameter(local_tensor(p)) for group in self.param_groups for p in group["params"]}
        self._inner = make(
            [{**group, "params": [self._local[p] for p in group["params"]]} for group in self.param_groups]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient, unless the attribute `found_inf` (a scalar) is set and not zero.

        The inner optimizers cannot read it on the device, so this waits for it. `closure` is not supported.
        """
        if closure is not None:
            raise NotImplementedError("ShardAdam.step takes no closure: AdamW needs one evaluation of the gradient")
        if bool(getattr(self, "found_inf", False)):
            return
        stepped = []
        for group, inner_group in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner_group["lr"] = float(group["lr"])
            here = [p for p in group["params"] if p.grad is not None]
            for parameter in here:
                inner_group["step"] = self._lend_state(parameter)
            stepped += here
        self._inner.step()
        for parameter in stepped:
            self.state[parameter]["step"] += 1
            self._local[parameter].grad = None

    def _lend_state(self, parameter: nn.Parameter) -> int:
        """Give the inner optimizer this rank's shards of gradient and moments; returns the steps done so far."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        local = self._local[parameter]
        local.grad = local_tensor(parameter.grad)
        done = int(state["step"])
        self._inner.state[local] = {
            "step": done,
            "exp_avg": local_tensor(state["exp_avg"]),
            "exp_avg_sq": local_tensor(state["exp_avg_sq"]),
        }
        return done


def host_adam(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> ShardAdam:
    """Build AdamW whose parameters, gradients and moments lie in host memory, where DeepSpeed's vectorised kernel runs.

    FSDP2's CPU offload policy keeps the sharded parameters and gradients there (see `parallel/parallelize.py`).
    """
    adam = load_host_adam()
    return ShardAdam(groups, betas, eps, lambda inner: adam(inner, lr=0.0, betas=betas, eps=eps))


def fused_adam(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> ShardAdam:
    """Build AdamW that runs NVIDIA apex's FusedAdam."""
    from apex.optimizers import FusedAdam

    return ShardAdam(groups, betas, eps, lambda inner: FusedAdam(inner, lr=0.0, betas=betas, eps=eps, adam_w_mode=True))
