"""Frozen parts of a model under every axis: bitwise as they were, and the rest as if they were excluded by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmtrain.config import ParallelConfig
from mmtrain.model.frozen import is_frozen
from tests.dist.frozen_steps import FrozenJob, FrozenOutcome, train_frozen
from tests.dist.layouts import MODEL
from tests.dist.pool import Pool

SHALLOW = replace(MODEL, num_layers=2, layer_pattern="LS")
BOTTOM = ("embed_tokens", "layers.0")
MIXED = ("layers.*.mixer", "layers.1.ffn.router", "lm_head", "layers.0.ffn.experts.w2_EDF")
ONLY = ("*", "!layers.1.ffn.experts", "!norm")
BY_HAND: dict[str, FrozenOutcome] = {}


def by_hand(pool: Pool, job: FrozenJob) -> FrozenOutcome:
    """The same steps of one process that computes all gradients, and throws those of frozen parameters away."""
    alone = replace(job, parallel=ParallelConfig(micro_batch_rows=job.parallel.micro_batch_rows), by_hand=True)
    if repr(alone) not in BY_HAND:
        BY_HAND[repr(alone)] = pool.run(train_frozen, alone, world=1)[0]
    return BY_HAND[repr(alone)]


def check(pool: Pool, job: FrozenJob, world: int) -> None:
    """Every rank against the steps by hand."""
    one, outcomes = by_hand(pool, job), pool.run(train_frozen, job, world=world)
    assert {name for many in outcomes for name in many.before} == one.before.keys()
    for rank, many in enumerate(outcomes):
        assert many.norms == pytest.approx(one.norms, rel=2e-5), f"rank {rank}: the norm has more or less in it"
        assert many.losses == pytest.approx(one.losses, rel=1e-5)
        for name, weight in many.after.items():
            frozen = is_frozen(name, job.frozen)
            assert (name in many.stateful) is (name in many.with_gradient) is not frozen, name
            if frozen:
                assert torch.equal(weight, many.before[name]), f"{name} is frozen and changed on rank {rank}"
            else:
                assert not torch.equal(weight, many.before[name]), f"{name} is trained and did not change"
                step = (one.after[name] - one.before[name]).norm()
                assert (weight - one.after[name]).norm() < 0.02 * step, f"{name} on rank {rank}"


@pytest.mark.parametrize("frozen", [BOTTOM, MIXED, ONLY], ids=["bottom", "mixed", "only"])
@pytest.mark.parametrize("options", [{}, {"activation_checkpoint": "block"}, {"reshard_after_forward": False}], ids=str)
def test_one_process(pool: Pool, frozen: tuple[str, ...], options: dict) -> None:
    check(pool, FrozenJob(frozen, ParallelConfig(**options), SHALLOW), 1)


@pytest.mark.parametrize("frozen", [BOTTOM, MIXED], ids=["bottom", "mixed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reshard_after_forward": False}, {"reshard_after_forward": True}, {"tp": 2}, {"cp": 2}, {"ep": 2}, {"etp": 2},
     {"pp": 2}],
    ids=str,
)  # fmt: skip
def test_two_ranks(pool: Pool, frozen: tuple[str, ...], options: dict) -> None:
    check(pool, FrozenJob(frozen, ParallelConfig(**options), SHALLOW), 2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
@pytest.mark.parametrize("frozen", [BOTTOM, ("embed_tokens", "layers.[01]"), MIXED], ids=["bottom", "half", "mixed"])
def test_schedules_of_pipelines(pool: Pool, schedule: str, frozen: tuple[str, ...]) -> None:
    parallel = ParallelConfig(pp=2, pp_chunks=2, pp_schedule=schedule)
    check(pool, FrozenJob(frozen, parallel, MODEL), 2)
