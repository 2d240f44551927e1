"""Parameters, gradients and moments in host memory (`optim=cpu_offload`) of ranks that share rows, beside float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.optim.host_kernel import load_host_adam
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.layouts import SEQ, micro_batch, whole
from tests.dist.pool import Pool
from tests.dist.test_layouts import SHALLOW

STEPS, ROWS, LR = 5, 4, 1e-2
ROUNDING = 1e-6  # of the largest element: some roundings of fp32
LAYOUTS = {
    "CP2": (2, {"cp": 2, "activation_checkpoint": "selective", "offload_block_inputs": True}),
    "CP4": (4, {"cp": 4, "cp_chunks": 3, "sync_every_micro_batch": True}),
    "CP2 x TP2": (4, {"cp": 2, "tp": 2, "reshard_after_forward": False}),
    "CP2 x DP2 x EP2": (4, {"cp": 2, "ep": 2, "activation_checkpoint": "block", "offload_block_inputs": True}),
    "CP2 x PP2": (4, {"cp": 2, "pp": 2}),
}


@dataclass
class Trained:
    """Whole tensors of a rank by the name of the parameter, after the steps: the optimizer's and the oracle's."""

    found: dict[str, dict[str, Tensor]]
    expected: dict[str, dict[str, Tensor]]


def train(parallel: ParallelConfig) -> Trained:
    """Steps of several micro-batches; the oracle is given the gradients that the optimizer is given, of all ranks."""
    layout = plan_layout(mesh.world_size(), parallel, SHALLOW, [SEQ])
    context = mesh.start(ClusterConfig(device="cpu"), layout)
    try:
        model = apply_parallel(meta_model(SHALLOW), context, parallel, torch.float32, host_parameters=True, seq_len=SEQ)
        model.initialise(7)
        optimizer = build_optimizer(model.module, OptimConfig(name="cpu_offload"))
        double = {name: torch.nn.Parameter(p.double()) for name, p in whole(model.module).items()}
        groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in double.values()]
        oracle = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=OptimConfig().eps)

        def step_oracle(*_: object) -> None:
            for name, gradient in whole(model.module, gradient=True).items():
                double[name].grad = gradient.double()
            oracle.step()

        optimizer.register_step_pre_hook(step_oracle)
        for step in range(STEPS):
            numbers = range(step * ROWS, (step + 1) * ROWS)[context.dp_rank :: context.dp_size]
            rows = [micro_batch(number, 1) for number in numbers]
            result = train_step(model, optimizer, rows, LR, SHALLOW.rope_base, clip_grad=1.0)
            assert not result.skipped
        found, expected = {}, {}
        for name, parameter in model.module.named_parameters():
            found[name] = {"weight": parameter, **optimizer.state[parameter]}
            expected[name] = {"weight": double[name].detach(), **oracle.state[double[name]]}
            found[name] = {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in found[name].items()}
        return Trained(found, expected)
    finally:
        mesh.stop()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS])
def test_ranks_that_share_rows_take_adamw_s_steps(pool: Pool, name: str) -> None:
    pytest.importorskip("deepspeed", reason="the extra `offload` is not installed")
    load_host_adam()  # compiles the kernel, if it has to, without a limit of time
    world, options = LAYOUTS[name]
    for rank, trained in enumerate(pool.run(train, ParallelConfig(**options), world=world)):
        assert trained.found.keys() == trained.expected.keys()
        for parameter, expected in trained.expected.items():
            found = trained.found[parameter]
            assert found.keys() == expected.keys() and float(found["step"]) == STEPS
            for key, x in expected.items():
                error = (found[key].double() - x).abs().max() / x.abs().max()
                assert error <= ROUNDING, f"{key} of {parameter} on rank {rank}: {error:.1e}"
