"""Several ranks that all have the whole model to compute with, and exchange shards once a step (ZeRO-1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mmtrain.build import build_model, meta_model
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.model.frozen import freeze
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh, weight_buckets
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.parallel.units import UnitWatch
from mmtrain.parallel.weight_buckets import ShardedWeight
from mmtrain.parallel.weight_exchange import WeightExchange
from mmtrain.train.step import model_inputs, train_step
from tests.dist.layouts import MODEL, SEQ, Job, micro_batch
from tests.dist.pool import Pool
from tests.dist.test_layouts import check

WHOLE = {"reshard_after_forward": False}
SHALLOW = replace(MODEL, num_layers=2, layer_pattern="LS")
# Rows that ranks share evenly, unevenly, and of which some have none; cut along the first or another dimension.
SHAPES = [((8, 3), 0), ((7, 5), 0), ((2, 9), 0), ((3, 8, 2), 1), ((2, 4, 5), 2), ((1,), 0), ((13,), 0)]


def whole_tensor(number: int, shape: tuple[int, ...], of: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * of + number))


def my_part(tensor: Tensor, dim: int) -> Tensor:
    parts = tensor.chunk(dist.get_world_size(), dim)  # as DTensor cuts
    mine = dist.get_rank()
    return parts[mine].clone() if mine < len(parts) else tensor.narrow(dim, 0, 0).clone()


def exchanged(dtypes: list[torch.dtype], bucket: int, done: list[list[int]]) -> None:
    """Assert on this rank that weights are gathered and sums reduced, whatever lay in the buffers before.

    Args:
        done: for every rank, units from which on its sums are said to be whole, one after the other.
    """
    mesh.start(ClusterConfig(device="cpu"))
    weight_buckets.BUCKET_ELEMENTS = bucket
    ranks, weights = dist.get_world_size(), []
    try:
        for number, (shape, dim) in enumerate(SHAPES):
            shard = my_part(whole_tensor(number, shape, of=9), dim)
            whole = torch.full(shape, float("nan"), dtype=dtypes[number % len(dtypes)])
            total = whole_tensor(number, shape, of=dist.get_rank())
            grad = torch.full_like(shard, float("nan"))
            weights.append(ShardedWeight(whole, total, shard, grad, dim, unit=number // 2))
        exchange = WeightExchange(weights, dist.group.WORLD)
        for _ in range(2):
            for unit in done[dist.get_rank()]:
                exchange.start_reduce(unit)
            exchange.finish_reduce()
            exchange.gather()
        for number, (weight, (shape, dim)) in enumerate(zip(weights, SHAPES, strict=True)):
            assert torch.equal(weight.whole, whole_tensor(number, shape, of=9).to(weight.whole.dtype)), shape
            mean = sum(whole_tensor(number, shape, of=rank).double() for rank in range(ranks)) / ranks
            torch.testing.assert_close(weight.grad.double(), my_part(mean, dim), rtol=0, atol=1e-6)
            assert torch.equal(weight.total, whole_tensor(number, shape, of=dist.get_rank())), "a sum was changed"
    finally:
        weight_buckets.BUCKET_ELEMENTS = 2**25
        mesh.stop()


@pytest.mark.parametrize("bucket", [2**25, 40, 1])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.bfloat16, torch.float32]], ids=str)
def test_weights_are_gathered_and_sums_reduced(pool: Pool, dtypes: list[torch.dtype], bucket: int) -> None:
    """With one bucket for all, several, and a bucket for each row of each weight; ranks hear of units as they do."""
    pool.run(exchanged, dtypes, bucket, [[], [3, 2, 1, 0], [2, 2], [4, 1]], world=4)


class Told:
    """What a model's exchange does, in the order in which it does it, beside the backward passes of its layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        for name in ("start_reduce", "start_gather"):
            monkeypatch.setattr(weight_buckets.Bucket, name, self._noted(name, getattr(weight_buckets.Bucket, name)))

    def _noted(self, name: str, real: Callable) -> Callable:
        def start(bucket: object, buffers: object) -> object:
            self.events.append(f"{name.removeprefix('start_')} {bucket.units[0]}")
            return real(bucket, buffers)

        return start

    def hear_backward(self, model: torch.nn.Module) -> None:
        def hook(number: int) -> Callable:
            return lambda *_: self.events.append(f"backward {1 + number}")

        for number, block in enumerate(model.layers):
            block.input_norm.register_full_backward_hook(hook(number))


def order_of_exchange(
    frozen: tuple[str, ...], micro_batches: int, recompute: str
) -> tuple[list[str], list[tuple[float, float]]]:
    """Events of the second of two steps of four layers that have buckets of their own; loss and norm of both."""
    weight_buckets.BUCKET_ELEMENTS = 1
    context = mesh.start(ClusterConfig(device="cpu"))
    model = meta_model(replace(SHALLOW, num_layers=4))
    freeze(model, frozen)
    parallel = ParallelConfig(**WHOLE, activation_checkpoint=recompute)
    laid = apply_parallel(model, context, parallel, torch.float32)
    laid.initialise(7)
    optimizer = build_optimizer(laid.module, OptimConfig())
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        told = Told(patch)
        told.hear_backward(laid.module)
        for _ in range(2):
            told.events.clear()
            batches = [micro_batch(row, 1) for row in range(micro_batches)]
            result = train_step(laid, optimizer, batches, 1e-2, 1e4, clip_grad=1.0)
            figures.append((result.loss, result.grad_norm))
    weight_buckets.BUCKET_ELEMENTS = 2**25
    mesh.stop()
    events = [event for event, before in zip(told.events, [None, *told.events], strict=False) if event != before]
    return events, figures


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_sums_travel_while_lower_layers_are_at_work(pool: Pool, recompute: str) -> None:
    (found, figures), (other, _) = pool.run(order_of_exchange, (), 2, recompute, world=2)
    backward = [f"backward {unit}" for unit in (4, 3, 2, 1)]
    gathered = [f"gather {unit}" for unit in range(6)]
    shared = [event for unit in (4, 3, 2, 1) for event in (f"backward {unit}", f"reduce {unit}")]
    assert found == other == [*gathered, *backward, "reduce 5", *shared, "reduce 0"]
    ((_, alone),) = pool.run(order_of_exchange, (), 2, recompute, world=1)  # the ranks had the same rows
    assert np.array(figures) == pytest.approx(np.array(alone), rel=1e-5)


def test_sums_over_frozen_layers_travel_at_the_end(pool: Pool) -> None:
    """No gradient passes the beginning of the lowest layer that is trained: nothing tells when its own are whole."""
    (found, _), (other, _) = pool.run(order_of_exchange, ("embed_tokens", "layers.[01]"), 1, "none", world=2)
    assert found == other and "reduce 2" not in found
    assert found[-2:] == ["backward 3", "reduce 3"] and "reduce 5" in found


ODD = replace(SHALLOW, hidden_size=40, num_heads=6, num_kv_heads=3, num_experts=5, ffn_hidden_size=24)


@pytest.mark.parametrize(
    ("job", "world"),
    [
        (Job(SHALLOW, ParallelConfig(**WHOLE), rows=8, steps=3), 4),
        (Job(ODD, ParallelConfig(**WHOLE, activation_checkpoint="block"), rows=6, steps=2), 3),
        (Job(SHALLOW, ParallelConfig(**WHOLE, cp=2, cp_chunks=2), rows=4, steps=2), 2),
    ],
    ids=["DP4", "DP3, uneven shards, recomputation", "CP2"],
)
def test_several_ranks_train_as_one_process(pool: Pool, job: Job, world: int) -> None:
    check(pool, job, world)


def laid_out(options: dict[str, bool]) -> tuple[bool, dict[str, tuple]]:
    """Whether FSDP2 is in use, and how every parameter lies."""
    parallel = ParallelConfig(**options)
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, ODD, [SEQ]))
    model = apply_parallel(meta_model(ODD), context, parallel, torch.float32)
    model.initialise(3)
    found = {}
    for name, parameter in model.module.named_parameters():
        assert isinstance(parameter, DTensor)
        found[name] = str(parameter.placements), parameter.shape, parameter.to_local().shape, parameter.dtype
    mesh.stop()
    return isinstance(model.module, FSDPModule), found


def test_masters_lie_as_under_fsdp(pool: Pool) -> None:
    """So optimizers and checkpoints see no difference."""
    whole, sharded = pool.run(laid_out, WHOLE, world=3), pool.run(laid_out, {}, world=3)
    assert [uses for uses, _ in whole] == [False] * 3 and [uses for uses, _ in sharded] == [True] * 3
    assert [found for _, found in whole] == [found for _, found in sharded]


def in_bf16(steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses of steps and of a validation after them, and all of a rank's types and copies at the end."""
    parallel = ParallelConfig(**WHOLE)
    context = mesh.start(ClusterConfig(device="cpu"))
    laid = apply_parallel(meta_model(SHALLOW), context, parallel, torch.bfloat16)
    laid.initialise(7)
    optimizer = build_optimizer(laid.module, OptimConfig())
    copies: dict[str, Tensor] = {}
    hook = laid.module.register_forward_pre_hook(lambda model, _: copies.update(model.named_parameters()))
    losses = []
    for step in range(steps):
        rows = range(4 * step, 4 * step + 4)[context.dp_rank :: context.dp_size]
        batches = [micro_batch(row, 1) for row in rows]
        losses.append(train_step(laid, optimizer, batches, 1e-2, 1e4, clip_grad=1.0).loss)
    masters = {name: parameter.full_tensor() for name, parameter in laid.module.named_parameters()}
    losses.append(float(laid.evaluate(model_inputs(micro_batch(50, 1), 1e4, context.device))))
    for name, copy in copies.items():
        dtype = torch.float32 if "router" in name else torch.bfloat16
        assert copy.dtype == dtype and torch.equal(copy.detach(), masters[name].to(dtype)), name
    hook.remove()
    mesh.stop()
    return losses, [copy.detach().clone() for copy in copies.values()]


def test_copies_are_the_newest_weights_on_every_rank(pool: Pool) -> None:
    """In bf16, routers in fp32; a validation after an update computes with it."""
    (losses, copies), (other, same) = pool.run(in_bf16, 3, world=2)
    assert len(copies) == len(list(build_model(SHALLOW).parameters()))
    assert losses == other and all(torch.equal(a, b) for a, b in zip(copies, same, strict=True))
    (alone, _), *_ = pool.run(in_bf16, 3, world=1)
    assert losses == pytest.approx(alone, rel=1e-2)


def test_a_layer_that_runs_twice_is_done_once_both_gradients_came() -> None:
    model, done = build_model(SHALLOW), []
    watch = UnitWatch(model, lambda unit: None, done.append)
    watch.begin(tells_done=True)
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    for given in (first, second):
        watch.reach(1, 1, [given * 2])
    for given in (first, second):
        watch.reach(2, 2, [given])
    second.sum().backward()
    assert done == []
    first.sum().backward()
    assert done == [2]
