"""The feed-forward in chunks under parallelism: gradients are those without chunks."""

from __future__ import annotations

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.pool import Pool
from tests.dist.test_sharding import SEQ, batch, whole

DENSE = {"num_experts": 0, "ffn_hidden_size": 40}
SHARED = {"num_experts": 4, "ffn_hidden_size": 16, "shared_ffn_hidden_size": 24}


def gradients(model: dict, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """Gradients of a step of two micro-batches."""
    config = ModelConfig(name="small", vocab_size=101, hidden_size=32, num_layers=2, layer_pattern="LS", num_heads=4,
                         num_kv_heads=2, head_dim=8, rotary_dim=4, loss_chunk_tokens=50, **model)  # fmt: skip
    layout = plan_layout(mesh.world_size(), parallel, config, [SEQ])
    context = mesh.start(ClusterConfig(device="cpu"), layout)
    try:
        laid = apply_parallel(meta_model(config), context, parallel, torch.float32, seq_len=SEQ)
        laid.initialise(7)
        optimizer, found = build_optimizer(laid.module, OptimConfig()), {}
        optimizer.register_step_pre_hook(lambda *_: found.update(whole(laid.module, gradient=True)))
        # The ranks that share rows have the same ones, others their own.
        first = mesh.world_size() * 2 if layout.dp == 1 else 2 * context.rank
        train_step(laid, optimizer, [batch(first), batch(first + 1)], 1e-2, 1e4, clip_grad=None)
        laid.close()
        return found
    finally:
        mesh.stop()


def assert_same(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    """Each gradient on every rank, up to rounding in fp32."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
            assert error < 2e-6, (name, float(error))


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(DENSE, {"tp": 2}, marks=pytest.mark.slow),
        (DENSE, {"activation_checkpoint": "block"}),
        (SHARED, {"tp": 2, "ep": 2, "token_groups": 2, "activation_checkpoint": "block"}),
        pytest.param(SHARED, {"ep": 2, "etp": 1, "token_groups": 4}, marks=pytest.mark.slow),
        pytest.param(SHARED, {"tp": 2, "etp": 2, "activation_checkpoint": "selective"}, marks=pytest.mark.slow),
        pytest.param({**SHARED, "capacity_factor": None}, {"ep": 2}, marks=pytest.mark.slow),
        pytest.param(DENSE, {"pp": 2, "activation_checkpoint": "block"}, marks=pytest.mark.slow),
        pytest.param(DENSE, {"cp": 2, "cp_chunks": 2, "reshard_after_forward": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_those_without_chunks(pool: Pool, model: dict, layout: dict) -> None:
    expected = pool.run(gradients, model, ParallelConfig(**layout), world=2)
    found = pool.run(gradients, model, ParallelConfig(**layout, ffn_chunk_tokens=7), world=2)
    assert_same(found, expected)
