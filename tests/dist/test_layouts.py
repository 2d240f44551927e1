"""Layouts against one process on the same global batch: initial weights, losses, gradients, router figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmtrain.config import ParallelConfig
from tests.dist.layouts import MODEL, Job, Outcome, alone, train
from tests.dist.pool import Pool

LOSS, GRADIENT, STEPS = 1e-5, 1e-4, 5
SHALLOW = replace(MODEL, num_layers=2, layer_pattern="LS")  # eight processes share the cores of the machine
FULL = {"activation_checkpoint": True, "micro_batch_rows": 1}
ALONE = [(axis, 2) for axis in ("dp", "tp", "ep", "etp")] + [
    pytest.param(axis, 4, marks=pytest.mark.slow) for axis in ("dp", "tp", "ep", "etp")
]
EIGHT = {
    "TP2 x EP2 x ETP2 x EDP2": {"tp": 2, "ep": 2, "etp": 2},
    "TP2 x ETP1 x EP4": {"tp": 2, "ep": 4},
    "EP8": {"ep": 8},
    "DP2 x TP4 with 2 KV heads": {"tp": 4},
    "TP8 x EP2 x ETP4": {"tp": 8, "ep": 2, "etp": 4},
}
GROUPED = {"G2": {"ep": 2, "token_groups": 2}, "G4": {"ep": 2, "etp": 2, "token_groups": 4}}


SINGLE: dict[str, Outcome] = {}


def single(pool: Pool, job: Job) -> Outcome:
    """What one process makes of a job, run once."""
    if repr(job) not in SINGLE:
        SINGLE[repr(job)] = pool.run(train, job, world=1)[0]
    return SINGLE[repr(job)]


def check(pool: Pool, job: Job, world: int) -> None:
    """Every rank against one process."""
    one = single(pool, alone(job))
    drops = job.model.capacity_factor is not None and job.model.num_experts > 0
    assert not drops or max(one.results[0].drop_rate) > 0.05, "nothing is dropped: the capacity is not tested"
    outcomes = pool.run(train, job, world=world)
    assert one.before.keys() == {name for many in outcomes for name in many.before}, "a pipeline lost parameters"
    for rank, many in enumerate(outcomes):
        assert many.gradients.keys() == many.before.keys()
        for name, weight in many.before.items():
            assert torch.equal(weight, one.before[name]), f"initial {name} depends on the layout"
            error = (many.gradients[name] - one.gradients[name]).norm() / one.gradients[name].norm()
            assert error < GRADIENT, f"gradient of {name} on rank {rank}: {error:.1e}"
        for step, (mine, theirs) in enumerate(zip(many.results, one.results, strict=True)):
            assert mine.loss == pytest.approx(theirs.loss, rel=LOSS), f"rank {rank}, step {step}"
        mine, theirs = many.results[0], one.results[0]  # later, Adam has made much of small differences
        for figure in ("aux_loss", "grad_norm", "flops"):
            assert getattr(mine, figure) == pytest.approx(getattr(theirs, figure), rel=LOSS), (figure, rank)
        assert mine.drop_rate == pytest.approx(theirs.drop_rate), rank
        assert mine.router_load == [pytest.approx(layer) for layer in theirs.router_load], rank


@pytest.mark.parametrize(("axis", "size"), ALONE)
def test_each_axis_alone(pool: Pool, axis: str, size: int) -> None:
    options = {} if axis == "dp" else {axis: size}
    check(pool, Job(parallel=ParallelConfig(**options)), size)


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_eight_processes(pool: Pool, name: str) -> None:
    """With packed rows, drops, accumulation over micro-batches and checkpointing, over several steps."""
    model = replace(SHALLOW, num_kv_heads=2) if "KV" in name else SHALLOW
    parallel = ParallelConfig(**EIGHT[name], **FULL)
    check(pool, Job(model, parallel, rows=2 * 8 // parallel.tp, steps=STEPS), 8)


@pytest.mark.slow
def test_two_key_value_heads_on_four_ranks(pool: Pool) -> None:
    """Ranks 0 and 1 use the first, ranks 2 and 3 the second."""
    check(pool, Job(replace(SHALLOW, num_kv_heads=2), ParallelConfig(tp=4)), 4)


@pytest.mark.parametrize("name", [pytest.param("G2", marks=pytest.mark.slow), "G4"])
def test_token_groups(pool: Pool, name: str) -> None:
    check(pool, Job(parallel=ParallelConfig(**GROUPED[name])), 4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"sync_every_micro_batch": True}, {"reshard_after_forward": False}], ids=str)
def test_ways_to_shard(pool: Pool, options: dict[str, bool]) -> None:
    check(pool, Job(parallel=ParallelConfig(tp=2, ep=2, **options)), 4)


@pytest.mark.slow
def test_odd_widths_and_uneven_shards(pool: Pool) -> None:
    """Widths that the data-parallel axes do not divide, three KV heads, five experts: shards of unequal size."""
    model = replace(MODEL, hidden_size=40, num_heads=6, num_kv_heads=3, num_experts=6, ffn_hidden_size=24)
    check(pool, Job(model, ParallelConfig(ep=3), rows=6), 3)
    check(pool, Job(model, ParallelConfig(tp=3, etp=3), rows=6), 3)


@pytest.mark.parametrize(
    "kind",
    [
        "shared expert",
        "dense",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("no drops", "position", "pre-norm")),
    ],
)
def test_variants_of_the_model(pool: Pool, kind: str) -> None:
    changes = {
        "shared expert": {"shared_ffn_hidden_size": 32},
        "no drops": {"capacity_factor": None},
        "position": {"drop_policy": "position"},
        "dense": {"num_experts": 0},
        "pre-norm": {"post_norm": False},
    }[kind]
    parallel = ParallelConfig(tp=2) if kind == "dense" else ParallelConfig(tp=2, ep=2, etp=2)
    check(pool, Job(replace(SHALLOW, **changes), parallel), 4)
