"""Steps of a model of which parts are frozen, on every process of a layout, and what is left of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.model.frozen import freeze, is_frozen
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.layouts import MODEL, SEQ, micro_batch, whole


@dataclass(frozen=True)
class FrozenJob:
    """Steps of `rows` packed rows.

    Attributes:
        frozen: patterns of what is not trained.
        by_hand: train all, and undo what happened to the frozen parameters: no gradient of theirs reaches the norm or
            the optimizer.
    """

    frozen: tuple[str, ...]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=lambda: MODEL)
    rows: int = 4
    steps: int = 3
    lr: float = 1e-3
    by_hand: bool = False


@dataclass
class FrozenOutcome:
    """What one rank saw: whole parameters that it has a part of, norms, and the names that have moments.

    Norms by hand are summed here, of the gradients of trained parameters.
    """

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    stateful: set[str]
    with_gradient: set[str]


def train_frozen(job: FrozenJob) -> FrozenOutcome:
    """Run on every process of the world."""
    layout = plan_layout(mesh.world_size(), job.parallel, job.model, [SEQ])
    try:
        return _train(job, mesh.start(ClusterConfig(device="cpu"), layout))
    finally:
        mesh.stop()


def _train(job: FrozenJob, context: mesh.ParallelContext) -> FrozenOutcome:
    module = meta_model(job.model)
    if not job.by_hand:
        freeze(module, job.frozen)
    model = apply_parallel(module, context, job.parallel, torch.float32)
    model.initialise(7)
    before = whole(model.module)
    optimizer = build_optimizer(model.module, OptimConfig(weight_decay=0.3))
    exact: list[float] = []
    if job.by_hand:
        measure = model.clip_gradients

        def without_frozen(max_norm: float | None, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            squares = 0.0
            for name, parameter in model.module.named_parameters():
                if is_frozen(name, job.frozen):
                    parameter.grad = None
                else:
                    squares += parameter.grad.full_tensor().double().square().sum().item()
            exact.append(squares**0.5)
            return measure(max_norm, flags)

        model.clip_gradients = without_frozen
    losses, norms, with_gradient = [], [], set()
    optimizer.register_step_pre_hook(
        lambda *_: with_gradient.update(n for n, p in model.module.named_parameters() if p.grad is not None)
    )
    rows = job.parallel.micro_batch_rows
    for step in range(job.steps):
        starts = range(step * job.rows, (step + 1) * job.rows, rows)[context.dp_rank :: context.dp_size]
        batches = [micro_batch(start, rows) for start in starts]
        result = train_step(model, optimizer, batches, job.lr, job.model.rope_base, clip_grad=0.5)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    stateful = {n for n, p in model.module.named_parameters() if optimizer.state.get(p)}
    assert all(isinstance(p, DTensor) for p in model.module.parameters())
    assert not dist.is_initialized() or not model.odd_copies()
    return FrozenOutcome(before, whole(model.module), losses, exact or norms, stateful, with_gradient)
