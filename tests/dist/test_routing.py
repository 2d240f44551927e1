"""Routing across ranks: capacity that micro-batches pool, and what the auxiliary loss is taken over."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.model.moe.router import Router, RoutingScope, expert_capacity, load_balancing_loss
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.routing import PooledCapacity, share_out
from tests.dist.layouts import MODEL, SEQ, Job, alone, train
from tests.dist.pool import Pool


def by_hand(wanted: list[int], pool: int) -> list[int]:
    """Largest remainder, with fractions."""
    total = sum(wanted)
    if total <= pool:
        return wanted
    shares = [Fraction(pool * want, total) for want in wanted]
    quotas = [int(share) for share in shares]
    order = sorted(range(len(wanted)), key=lambda i: (-(shares[i] - quotas[i]), i))
    for i in order[: pool - sum(quotas)]:
        quotas[i] += 1
    return quotas


def test_share_out_equals_largest_remainder_by_hand() -> None:
    draw = random.Random(0)
    for _ in range(300):
        micro_batches, experts = draw.randint(1, 6), draw.randint(1, 5)
        wanted = [[draw.choice([0, 1, draw.randint(0, 40)]) for _ in range(experts)] for _ in range(micro_batches)]
        pool = draw.randint(1, 60)
        found = share_out(torch.tensor(wanted, dtype=torch.int32), pool)
        assert found.dtype == torch.int32
        for expert in range(experts):
            column = [row[expert] for row in wanted]
            assert found[:, expert].tolist() == by_hand(column, pool)
            assert all(quota <= want for quota, want in zip(found[:, expert].tolist(), column, strict=True))


def logits_of(micro_batch: int) -> torch.Tensor:
    """Some micro-batches want other experts than the rest."""
    x = torch.randn(SEQ, MODEL.num_experts, generator=torch.Generator().manual_seed(micro_batch))
    return x + 2.0 * (torch.arange(MODEL.num_experts) == micro_batch)


def route_pooled(parallel: ParallelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank's micro-batch wants and keeps of each expert."""
    from mmkernels.moe import route

    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, MODEL))
    try:
        capacity = expert_capacity(SEQ, MODEL.top_k, MODEL.num_experts, 1.25)
        quotas = PooledCapacity(context).quotas(capacity)
        plan = route(logits_of(context.dp_rank), MODEL.top_k, quotas=quotas)
        return plan.assigned_E, plan.count_E
    finally:
        mesh.stop()


@pytest.mark.parametrize(
    ("options", "world"),
    [pytest.param({"ep": 4}, 4, marks=pytest.mark.slow), ({"tp": 2, "ep": 2, "etp": 2}, 4), ({"ep": 2}, 4)],
    ids=str,
)
def test_micro_batches_pool_their_capacity(pool: Pool, options: dict[str, int], world: int) -> None:
    parallel = ParallelConfig(global_router=True, **options)
    found = pool.run(route_pooled, parallel, world=world)[:: parallel.tp]
    pooled = parallel.ep * parallel.etp // parallel.tp
    capacity = expert_capacity(SEQ, MODEL.top_k, MODEL.num_experts, 1.25)
    fewer = 0
    for first in range(0, len(found), pooled):
        wanted, kept = (torch.stack([pair[i] for pair in found[first : first + pooled]]) for i in (0, 1))
        for expert in range(MODEL.num_experts):
            assert kept[:, expert].tolist() == by_hand(wanted[:, expert].tolist(), pooled * capacity)
        assert kept.sum() >= wanted.clamp(max=capacity).sum()
        fewer += int(kept.sum() - wanted.clamp(max=capacity).sum())
    assert fewer > 0


@pytest.mark.slow
def test_training_with_the_global_router_drops_less_and_says_so(pool: Pool) -> None:
    model = replace(MODEL, num_layers=2, layer_pattern="LS")
    drops = []
    for pooled in (False, True):
        parallel = ParallelConfig(ep=4, global_router=pooled, activation_checkpoint=True)
        many = pool.run(train, Job(model, parallel, rows=4), world=4)
        drops.append(many[0].results[0])
        for other in many[1:]:
            assert all(torch.equal(other.gradients[name], gradient) for name, gradient in many[0].gradients.items())
    without, pooled = drops
    assert without.drop_rate_alone == without.drop_rate and sum(pooled.drop_rate) < sum(without.drop_rate)
    # What was not dropped changes what later layers are given.
    assert pooled.drop_rate_alone[0] == without.drop_rate[0] > pooled.drop_rate[0]
    assert pooled.drop_rate_alone[1] > pooled.drop_rate[1]


def test_a_pipeline_counts_the_same_drops_without_the_pool(pool: Pool) -> None:
    model, pooled = replace(MODEL, num_layers=2, layer_pattern="LS"), {"ep": 2, "global_router": True}
    flat = pool.run(train, Job(model, ParallelConfig(**pooled), rows=4), world=2)[0].results[0]
    for piped in pool.run(train, Job(model, ParallelConfig(pp=2, **pooled), rows=4), world=4):
        assert piped.results[0].drop_rate_alone == pytest.approx(flat.drop_rate_alone)
    assert all(alone > drop for alone, drop in zip(flat.drop_rate_alone, flat.drop_rate, strict=True))


def test_the_loss_over_sequences_is_the_mean_of_its_rows() -> None:
    torch.manual_seed(0)
    router = Router(MODEL)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(3 * SEQ, MODEL.hidden_size)
    router.scope = RoutingScope(parts=3)
    together = router(x)[1].aux_loss
    router.scope = RoutingScope()
    assert together.item() == pytest.approx(sum(router(row)[1].aux_loss.item() for row in x.chunk(3)) / 3, rel=1e-6)
    assert together.item() != pytest.approx(router(x)[1].aux_loss.item(), rel=1e-3)
    assert load_balancing_loss(torch.full((4, 2), 0.5), torch.tensor([4, 4]), 2).item() == pytest.approx(1.0)


def test_the_loss_over_sequences_does_not_depend_on_the_layout(pool: Pool) -> None:
    """Micro-batches of two rows: their loss over rows is another than over all of their tokens."""
    parallel = ParallelConfig(tp=2, ep=2, aux_loss_over="sequence", micro_batch_rows=2)
    job = Job(replace(MODEL, num_layers=2, layer_pattern="LS", aux_loss_coef=1.0), parallel, rows=4)
    one = pool.run(train, alone(job), world=1)[0]
    together = pool.run(train, alone(replace(job, parallel=ParallelConfig(micro_batch_rows=2))), world=1)[0]
    assert one.results[0].aux_loss != pytest.approx(together.results[0].aux_loss, rel=1e-3)
    for many in pool.run(train, job, world=4):
        assert many.results[0].aux_loss == pytest.approx(one.results[0].aux_loss, rel=1e-6)
        for name, gradient in one.gradients.items():
            assert (many.gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name
