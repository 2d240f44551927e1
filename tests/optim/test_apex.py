"""`optim=apex` through a stand-in with FusedAdam's interface: raw tensors only, steps counted in the group."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch.distributed.tensor import DTensor

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer, set_lr
from mmtrain.parallel import mesh
from mmtrain.parallel.parallelize import apply_parallel
from tests.model.small import small_config


class StandIn(torch.optim.Optimizer):
    """AdamW as FusedAdam keeps it (the real one needs NVIDIA's build and a GPU)."""

    def __init__(self, groups: list, lr: float, betas: tuple, eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                assert not any(isinstance(t, DTensor) for t in tensors), "a raw kernel cannot read a DTensor"
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] * (mean / scale + group["weight_decay"] * p))


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[mesh.ParallelContext]:
    module = ModuleType("apex.optimizers")
    module.FusedAdam = StandIn
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    yield mesh.start(ClusterConfig(device="cpu"))
    mesh.stop()


def test_fused_adam_on_a_sharded_model_equals_adamw(context: mesh.ParallelContext) -> None:
    models, optimizers = [], []
    for name in ("adamw", "apex"):
        model = apply_parallel(meta_model(small_config(num_layers=2)), context, ParallelConfig(), torch.float32)
        model.initialise(3)
        models.append(model.module)
        optimizers.append(build_optimizer(model.module, OptimConfig(name=name)))
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                local = torch.randn(p.shape, generator=generator)
                p.grad = DTensor.from_local(local, p.device_mesh, p.placements)
            set_lr(optimizer, 1e-2 * (step + 1))
            optimizer.step()
        if step == 1:  # as a checkpoint restores it: the count of steps must come along
            again = build_optimizer(models[1], OptimConfig(name="apex"))
            again.load_state_dict(optimizers[1].state_dict())
            optimizers[1] = again
    for expected, found in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), expected.full_tensor(), rtol=1e-5, atol=1e-6)
