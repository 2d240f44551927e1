"""FSDP2 against one process, parameter by parameter: initial weights, gradients, weights after a step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mmdata.rows.loader import PackedBatch
from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.fsdp import set_micro_batch
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import model_inputs, train_step
from tests.dist.pool import Pool

ROWS, SEQ = 8, 48


def model_config() -> ModelConfig:
    # 6 heads, 5 experts, odd widths: shards of unequal size, and some ranks with no row of a parameter at all.
    return ModelConfig("small", vocab_size=101, hidden_size=36, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=6,
                       ffn_hidden_size=20, layer_pattern="LLLS", rotary_dim=4, num_experts=5, capacity_factor=0.8,
                       loss_chunk_tokens=50)  # fmt: skip


def batch(row: int) -> PackedBatch:
    """A row of documents of random lengths, some of one token."""
    rng = np.random.default_rng(row)
    tokens = rng.integers(0, 101, SEQ + 1)
    cuts = sorted({0, SEQ, *rng.integers(1, SEQ, 5).tolist(), 7, 8})
    position = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(cuts)])
    mask = np.ones(SEQ, dtype=bool)
    mask[np.array(cuts[1:]) - 1] = False
    mask[: row * 5] = False  # rows with different numbers of labels: the mean is over the global batch
    as_row = [torch.from_numpy(a)[None] for a in (tokens[:-1], tokens[1:], mask, position)]
    return PackedBatch(*as_row, cu_seqlens=torch.tensor(cuts, dtype=torch.int32), rows=(row,))


def run(parallel: ParallelConfig) -> tuple:
    context = mesh.start(ClusterConfig(device="cpu"))
    model = apply_parallel(meta_model(model_config()), context, parallel, torch.float32)
    model.initialise(7)
    before = whole(model.module)
    optimizer = build_optimizer(model.module, OptimConfig())
    gradients: dict[str, torch.Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: gradients.update(whole(model.module, gradient=True)))
    batches = [batch(row) for row in range(context.rank, ROWS, mesh.world_size())]
    result = train_step(model, optimizer, batches, 1e-2, model.module.config.rope_base, clip_grad=None)
    after = whole(model.module)
    mesh.stop()
    return before, gradients, after, result


def whole(model: nn.Module, gradient: bool = False) -> dict[str, torch.Tensor]:
    """Full parameters, or their full gradients."""
    return {name: (p.grad if gradient else p).full_tensor().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def single(pool: Pool) -> tuple:
    return pool.run(run, ParallelConfig(), world=1)[0]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, ParallelConfig()),
        (4, ParallelConfig(sync_every_micro_batch=True)),
        (4, ParallelConfig(reshard_after_forward=False, activation_checkpoint=True)),
        (2, ParallelConfig(reshard_after_forward=False, sync_every_micro_batch=True)),
    ],
)
def test_weights_gradients_and_step_equal_one_process(
    pool: Pool, single: tuple, world: int, parallel: ParallelConfig
) -> None:
    before, gradients, after, result = single
    many_before, many_gradients, many_after, many_result = pool.run(run, parallel, world=world)[0]
    assert before.keys() == many_before.keys() == many_gradients.keys()
    for name, weight in before.items():
        assert torch.equal(weight, many_before[name]), f"initial {name} depends on the layout"
        torch.testing.assert_close(many_gradients[name], gradients[name], rtol=1e-4, atol=1e-8, msg=name)
        torch.testing.assert_close(many_after[name], after[name], rtol=1e-4, atol=2e-5, msg=name)
    assert many_result.loss == pytest.approx(result.loss, rel=1e-6)
    assert many_result.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
    assert many_result.drop_rate == pytest.approx(result.drop_rate) and max(result.drop_rate) > 0.1
    assert many_result.router_load == [pytest.approx(layer) for layer in result.router_load]
    assert many_result.flops == pytest.approx(result.flops)


def gathered_after_micro_batches(parallel: ParallelConfig) -> list[bool]:
    """Whether a rank holds its blocks' parameters whole after each micro-batch's backward."""
    config = replace(model_config(), num_experts=4, ffn_hidden_size=24, num_heads=4, num_kv_heads=2)
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, config, [SEQ]))
    model = apply_parallel(meta_model(config), context, parallel, torch.float32)
    model.initialise(7)
    found = []
    for row in range(3):
        set_micro_batch(model.module, parallel, last=row == 2)
        out = model.module(*model_inputs(batch(row), 1e4, context.device))
        (out.ce_sum + out.aux_loss).backward()
        mixers = [parameter for block in model.module.layers for parameter in block.mixer.parameters()]
        whole = {not isinstance(parameter, DTensor) for parameter in mixers}
        assert len(whole) == 1
        found.append(whole.pop())
    mesh.stop()
    return found


@pytest.mark.parametrize("reshard", [False, True])
def test_parameters_kept_between_forward_and_backward_are_gathered_once_a_step(pool: Pool, reshard: bool) -> None:
    parallel = ParallelConfig(reshard_after_forward=reshard, ep=2)  # without ep FSDP2 has nothing to do
    assert pool.run(gathered_after_micro_batches, parallel, world=2) == [[not reshard, not reshard, False]] * 2
