"""Rows that end in padding, in any layout: the step of their real tokens alone, computed apart without any padding."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdata.rows.loader import PackedBatch
from mmtrain.build import build_model, meta_model
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.model.flops import step_flops
from mmtrain.model.moe.router import Router, RoutingScope, expert_capacity
from mmtrain.model.packed_seq import Packing, RealTokens
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.parallel.routing import PooledCapacity
from mmtrain.train.evaluate import evaluate
from tests.dist.layouts import MODEL, SEQ, Job, alone, micro_batch, train
from tests.dist.pool import Pool
from tests.dist.test_routing import by_hand, logits_of

# Micro-batches without padding, with fewer real tokens than ranks, and with none at all.
REAL = (48, 31, 1, 44, 40, 0, 17, 25)
LOUD = replace(MODEL, num_layers=2, layer_pattern="LS", capacity_factor=0.6, aux_loss_coef=1.0)
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "one process": ({}, 1),
    "DP2": ({}, 2),
    "TP2, rows together": ({"tp": 2, "micro_batch_rows": 2, "activation_checkpoint": True}, 2),
    "EP2": ({"ep": 2}, 2),
    "TP2 x EP2 x ETP2": ({"tp": 2, "ep": 2, "etp": 2, "activation_checkpoint": True}, 4),
    "PP2": ({"pp": 2}, 2),
    "DP4, rows together": ({"micro_batch_rows": 2}, 4),
    "TP2 x EP4": ({"tp": 2, "ep": 4}, 4),
    "EP2 x ETP2": ({"ep": 2, "etp": 2, "micro_batch_rows": 2}, 4),
    "EP2 x ETP2, token groups": ({"ep": 2, "etp": 2, "token_groups": 4}, 4),
    "EP4, peer buffers": ({"ep": 4, "exchange": "direct"}, 4),
    "TP2 x EP2 x ETP2, peer buffers": ({"tp": 2, "ep": 2, "etp": 2, "exchange": "direct"}, 4),
    "PP2 x TP2, zero bubble": ({"pp": 2, "tp": 2, "pp_schedule": "zero_bubble"}, 4),
    "PP2 x EP2, interleaved": ({"pp": 2, "ep": 2, "pp_schedule": "interleaved", "pp_chunks": 2}, 4),
}
QUICK = ("one process", "EP2", "TP2 x EP2 x ETP2", "PP2")


class Step(NamedTuple):
    """Figures of a step."""

    figures: dict[str, float]
    per_layer: dict[str, list[float]]
    gradients: dict[str, Tensor]


def documents(batch: PackedBatch) -> tuple[Tensor, Packing, Tensor]:
    """The tokens of a batch laid end to end without padding, and their labels."""
    real_BS = torch.arange(SEQ) < torch.tensor(batch.real_tokens)[:, None]
    begins = torch.nonzero(batch.position_ids_BS[real_BS] == 0).flatten().tolist()
    lengths = [b - a for a, b in itertools.pairwise([*begins, int(real_BS.sum())])]
    labels = batch.labels_BS.masked_fill(~batch.loss_mask_BS, -100)[real_BS]
    return batch.tokens_BS[real_BS], Packing.from_lengths(lengths), labels


def without_padding(job: Job) -> Step:
    """A step of the documents laid end to end, without parallelism or any code of the step's."""
    model = build_model(job.model, seed=7).train()
    rows = job.parallel.micro_batch_rows
    batches = [micro_batch(first, rows, job.real) for first in range(0, job.rows, rows)]
    labelled, tokens = sum(int(b.loss_mask_BS.sum()) for b in batches), sum(sum(b.real_tokens) for b in batches)
    layers, experts, top_k = job.model.num_layers, job.model.num_experts, job.model.top_k
    loss, aux, flops = 0.0, 0.0, 0.0
    kept, entropy, assigned = torch.zeros(layers), torch.zeros(layers), torch.zeros(layers, experts)
    for batch in batches:
        if not (count := sum(batch.real_tokens)):
            continue  # no loss, no auxiliary loss; yet one of the micro-batches
        inputs = documents(batch)
        out, lengths = model(*inputs), inputs[1].lengths
        (out.ce_sum / labelled + out.aux_loss / len(batches)).backward()
        loss, aux = loss + out.ce_sum.item() / labelled, aux + out.aux_loss.item() / len(batches)
        here = torch.tensor([(1 - stats.drop_rate.item()) * count * top_k for stats in out.router])
        kept, assigned = kept + here, assigned + torch.stack([stats.assigned_E for stats in out.router])
        entropy += torch.tensor([stats.entropy.item() for stats in out.router]) * count / tokens
        flops += step_flops(job.model, lengths, float(here.sum())).total
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    drop_rate = 1 - kept / (tokens * top_k)
    assert min(drop_rate) > 0.05, "nothing is dropped: the capacity is not tested"
    return Step(
        {"loss": loss, "aux_loss": aux, "grad_norm": norm, "flops": flops, "tokens": tokens},
        {"drop_rate": drop_rate.tolist(), "router_entropy": entropy.tolist(),
         "router_load": (assigned * experts / (tokens * top_k)).flatten().tolist()},
        gradients,
    )  # fmt: skip


EXPECTED: dict[str, Step] = {}


def expected(job: Job) -> Step:
    if (key := repr(alone(job))) not in EXPECTED:
        EXPECTED[key] = without_padding(job)
    return EXPECTED[key]


def check(pool: Pool, job: Job, world: int) -> None:
    """Every rank's step against the one without padding."""
    want = expected(job)
    for rank, many in enumerate(pool.run(train, job, world=world)):
        result = many.results[0]
        for name, value in want.figures.items():
            assert getattr(result, name) == pytest.approx(value, rel=1e-5), (name, rank)
        load = [share for layer in result.router_load for share in layer]
        found = {"drop_rate": result.drop_rate, "router_entropy": result.router_entropy, "router_load": load}
        for name, values in want.per_layer.items():
            assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-6), (name, rank)
        for name, gradient in many.gradients.items():
            error = (gradient - want.gradients[name]).norm() / want.gradients[name].norm()
            assert error < 1e-4, f"gradient of {name} on rank {rank}: {error:.1e}"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_a_step_is_that_of_its_real_tokens(pool: Pool, name: str) -> None:
    options, world = LAYOUTS[name]
    model = replace(LOUD, num_layers=4, layer_pattern="LLLS") if "interleaved" in name else LOUD
    check(pool, Job(model, ParallelConfig(**options), real=REAL), world)


@pytest.mark.parametrize("policy", ["probs", pytest.param("position", marks=pytest.mark.slow)])
def test_drop_policies(pool: Pool, policy: str) -> None:
    check(pool, Job(replace(LOUD, drop_policy=policy), ParallelConfig(tp=2), real=(48, 9)), 2)


def validate(job: Job) -> float:
    """Held-out loss of this process's rows and the others'."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), job.parallel, job.model, [SEQ]))
    try:
        model = apply_parallel(meta_model(job.model), context, job.parallel, torch.float32)
        model.initialise(7)
        mine = range(context.dp_rank, job.rows, context.dp_size)
        batches = [(micro_batch(row, 1, job.real), True) for row in mine]
        return evaluate(model, batches, np.ones(job.model.vocab_size), job.model.rope_base).loss
    finally:
        mesh.stop()


@pytest.mark.parametrize("name", ["EP2", *(pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS if "zero" in n)])
def test_a_validation_is_that_of_its_real_tokens(pool: Pool, name: str) -> None:
    """As where there is less held-out text than a row."""
    options, world = LAYOUTS[name]
    batches = [micro_batch(row, 1, REAL) for row in range(len(REAL)) if REAL[row]]
    model = build_model(LOUD, seed=7).eval()
    with torch.no_grad():
        nats = sum(model(*documents(batch)).ce_sum.item() for batch in batches)
    wanted = nats / sum(int(batch.loss_mask_BS.sum()) for batch in batches)
    for loss in pool.run(validate, Job(LOUD, ParallelConfig(**options), real=REAL), world=world):
        assert loss == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("over", ["sequence", "global_batch"])
@pytest.mark.parametrize("options", [{"tp": 2, "ep": 2, "etp": 2}, {"pp": 2, "tp": 2}, {"ep": 4}], ids=str)
def test_auxiliary_losses_do_not_depend_on_the_layout(pool: Pool, options: dict[str, int], over: str) -> None:
    """Of two steps; `tests/model/moe/test_padding.py` has their definition."""
    parallel = ParallelConfig(**options, aux_loss_over=over, micro_batch_rows=2)
    job = Job(LOUD, parallel, real=(48, 31, 1, 44, 40, 6, 17, 25), steps=2, lr=0.0, probe=1)
    one = pool.run(train, alone(job), world=1)[0]
    for many in pool.run(train, job, world=4):
        for mine, theirs in zip(many.results, one.results, strict=True):
            assert mine.aux_loss == pytest.approx(theirs.aux_loss, rel=1e-6)
        for name, gradient in many.gradients.items():
            assert (gradient - one.gradients[name]).norm() < 1e-4 * one.gradients[name].norm(), name


def route_pooled(parallel: ParallelConfig, real: tuple[int, ...]) -> tuple[Tensor, Tensor, float, float]:
    """Assignments that this rank's micro-batch of `real` tokens wants and keeps of each expert, and its drop rates."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, MODEL))
    try:
        router = Router(replace(MODEL, hidden_size=MODEL.num_experts, capacity_factor=1.25))
        with torch.no_grad():
            router.weight.copy_(torch.eye(MODEL.num_experts))
        router.scope = RoutingScope(pool=PooledCapacity(context))
        tokens = RealTokens.from_rows([real[context.dp_rank % len(real)]], SEQ)
        plan, stats = router(logits_of(context.dp_rank), replace(Packing.from_lengths([SEQ]), real=tokens))
        return stats.assigned_E, plan.count_E, stats.drop_rate.item(), stats.drop_rate_alone.item()
    finally:
        mesh.stop()


def test_a_pool_is_the_sum_of_the_capacities_of_real_tokens(pool: Pool) -> None:
    real = (48, 20, 5, 33)
    found = pool.run(route_pooled, ParallelConfig(global_router=True, ep=4), real, world=4)
    capacities = [expert_capacity(tokens, MODEL.top_k, MODEL.num_experts, 1.25) for tokens in real]
    wanted, kept = (torch.stack([each[i] for each in found]) for i in (0, 1))
    assert wanted.sum(1).tolist() == [tokens * MODEL.top_k for tokens in real]
    assert kept.sum() < wanted.sum()
    for expert in range(MODEL.num_experts):
        assert kept[:, expert].tolist() == by_hand(wanted[:, expert].tolist(), sum(capacities))
    for (assigned, count, drop, without), tokens, capacity in zip(found, real, capacities, strict=True):
        assert drop == pytest.approx(1 - count.sum().item() / (tokens * MODEL.top_k), abs=1e-6)
        assert without == pytest.approx(
            1 - assigned.clamp(max=capacity).sum().item() / (tokens * MODEL.top_k), abs=1e-6
        )


@pytest.mark.parametrize(
    ("options", "world"), [({"ep": 2}, 2), pytest.param({"tp": 2, "ep": 4}, 4, marks=pytest.mark.slow)], ids=str
)
def test_a_pooled_step_drops_real_assignments_alone(pool: Pool, options: dict[str, int], world: int) -> None:
    """Two micro-batches, one mostly of padding, whose tokens lend the other hardly any capacity."""
    parallel = ParallelConfig(global_router=True, **options)
    job = Job(replace(LOUD, capacity_factor=0.8), parallel, rows=2, real=(48, 3))
    for many in pool.run(train, job, world=world):
        (result,) = many.results
        assert result.tokens == 51
        capacity = sum(expert_capacity(tokens, MODEL.top_k, MODEL.num_experts, 0.8) for tokens in (48, 3))
        first = [share * 51 * MODEL.top_k / MODEL.num_experts for share in result.router_load[0]]
        kept = sum(min(count, capacity) for count in first)
        assert result.drop_rate[0] == pytest.approx(1 - kept / (51 * MODEL.top_k), rel=1e-5)
        assert result.drop_rate_alone[0] >= result.drop_rate[0] > 0.05
