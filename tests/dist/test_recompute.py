"""What backward computes again changes no gradient: every policy beside none, in one process and under parallelism."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.model.mixers.attention import LocalAttention
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.pool import Pool
from tests.dist.test_sharding import SEQ, batch, whole

POLICIES = [{"activation_checkpoint": policy, "offload_block_inputs": host}
            for policy in ("block", "selective") for host in (False, True, 3)]  # fmt: skip


def model_config() -> ModelConfig:
    return ModelConfig(name="small", vocab_size=101, hidden_size=32, num_layers=4, layer_pattern="SLSS", num_heads=4,
                       num_kv_heads=2, head_dim=8, rotary_dim=4, ffn_hidden_size=24, num_experts=4,
                       loss_chunk_tokens=50)  # fmt: skip


def gradients(parallel: ParallelConfig) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a step of two micro-batches, and how often softmax attention ran."""
    model, calls = model_config(), []
    layout = plan_layout(mesh.world_size(), parallel, model, [SEQ])
    context = mesh.start(ClusterConfig(device="cpu"), layout)
    real = LocalAttention.softmax

    def counted(self: LocalAttention, *given: object) -> torch.Tensor:
        calls.append(1)
        return real(self, *given)

    try:
        with mock.patch.object(LocalAttention, "softmax", counted):
            laid = apply_parallel(meta_model(model), context, parallel, torch.float32, seq_len=SEQ)
            laid.initialise(7)
            optimizer, found = build_optimizer(laid.module, OptimConfig()), {}
            optimizer.register_step_pre_hook(lambda *_: found.update(whole(laid.module, gradient=True)))
            train_step(laid, optimizer, [batch(0), batch(1)], 1e-2, 1e4, clip_grad=None)
            return found, len(calls)
    finally:
        mesh.stop()


def test_gradients_are_the_same_to_the_bit_and_selective_runs_attention_once(pool: Pool) -> None:
    expected, once = pool.run(gradients, ParallelConfig(), world=1)[0]
    for policy in POLICIES:
        found, calls = pool.run(gradients, ParallelConfig(**policy), world=1)[0]
        assert calls == (once if policy["activation_checkpoint"] == "selective" else 2 * once), policy
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (policy, name)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, {"cp": 2, "cp_chunks": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"pp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_the_same_under_parallelism(pool: Pool, world: int, layout: dict) -> None:
    expected, _ = pool.run(gradients, ParallelConfig(**layout), world=world)[0]
    for policy in POLICIES[1:]:
        found, _ = pool.run(gradients, ParallelConfig(**layout, **policy), world=world)[0]
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=f"{policy} {name}")


def offloaded(parallel: ParallelConfig) -> list[int]:
    """Numbers of this rank's layers whose inputs go to host memory."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, model_config(), [SEQ]))
    try:
        laid = apply_parallel(meta_model(model_config()), context, parallel, torch.float32, seq_len=SEQ)
        return [int(name) for name, block in laid.module.layers.named_children() if block.host_inputs is not None]
    finally:
        mesh.stop()


def test_inputs_of_the_first_blocks_of_each_rank_are_offloaded(pool: Pool) -> None:
    options = {"activation_checkpoint": "block"}
    for given, expected in ((False, []), (2, [0, 1]), (True, [0, 1, 2, 3])):
        assert pool.run(offloaded, ParallelConfig(**options, offload_block_inputs=given), world=1) == [expected]
    stages = ParallelConfig(**options, offload_block_inputs=1, pp=2)
    first, second = pool.run(offloaded, stages, world=2)
    assert first == [0] and len(second) == 1 and second[0] > 0
