"""Frozen parts under CUDA graphs: the same bits as without graphs, and what is frozen as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.config import ModelConfig, OptimConfig, ParallelConfig
from mmtrain.model.frozen import freeze, is_frozen
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.gpu.test_graphs_gpu import DENSE, EXPERTS, context, rows, sums_in_one_order

__all__ = ["context", "sums_in_one_order"]  # fixtures
pytestmark = pytest.mark.gpu
PARTS = {
    "embedding": ("embed_tokens",),
    "bottom": ("embed_tokens", "layers.[01]"),  # the first segment has no backward
    "mixers and head": ("layers.*.mixer", "lm_head"),
    "all but the last norm": ("*", "!norm"),
    "all but a layer": ("*", "!layers.2"),
}


@pytest.fixture(params=PARTS)
def frozen(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    yield PARTS[request.param]


def train(
    context: ParallelContext, model: ModelConfig, frozen: tuple[str, ...], graphs: bool, **options: object
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """Losses and norms of steps, weights before and after them, and notes."""
    module = meta_model(model)
    freeze(module, frozen)
    laid = apply_parallel(module, context, ParallelConfig(cuda_graphs=graphs, **options), torch.bfloat16)
    laid.initialise(0)
    before = {name: p.to_local().clone() for name, p in laid.module.named_parameters()}
    optimizer = build_optimizer(laid.module, OptimConfig())
    found = []
    for batches in [*rows(), *rows()]:
        result = train_step(laid, optimizer, batches, 1e-3, 1e4, clip_grad=1.0)
        found.append((result.loss, result.grad_norm))
    after = {name: p.to_local().clone() for name, p in laid.module.named_parameters()}
    notes = laid.take_notes()
    laid.close()
    return found, before, after, notes


@pytest.mark.parametrize("model", [DENSE, EXPERTS, replace(DENSE, layer_pattern="L")], ids=["dense", "experts", "L"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_graphs_train_what_is_trained_alone(
    context: ParallelContext, frozen: tuple[str, ...], model: ModelConfig, recompute: str
) -> None:
    plain, before, expected, _ = train(context, model, frozen, False, activation_checkpoint=recompute)
    graphs, _, weights, notes = train(context, model, frozen, True, activation_checkpoint=recompute)
    assert any("recorded" in line for line in notes) and not any("without" in line for line in notes)
    assert graphs == plain
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
        assert torch.equal(weight, before[name]) is is_frozen(name, frozen), name
