"""A model with eyes in every layout against one process: losses, and gradients by name, wherever images fell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmtrain.config import ParallelConfig
from tests.dist.pool import Pool
from tests.dist.vision_steps import EXPERTS, EYES, MIXED, VL, Seen, VisionJob, alone, train_vision

SINGLE: dict[str, Seen] = {}
NONE: tuple[Any, ...] = ((),)
FIRST: tuple[Any, ...] = (MIXED[0], (), (), ())
LAST: tuple[Any, ...] = ((), (), (), MIXED[0])  # of a step's micro-batches, the first has none
EARLY: tuple[Any, ...] = (MIXED[0], MIXED[2], (), ())  # and here the last has none on any of two ranks
TOWER, PROJECTOR, TEXT = "encoder.vision_tower", "encoder.projector", ("*", "!encoder")
ZERO_3: dict[str, Any] = {"reshard_after_forward": True}
WHOLE: dict[str, Any] = {"reshard_after_forward": False}  # ranks keep all weights; their exchange knows no float64


def single(pool: Pool, job: VisionJob) -> Seen:
    if repr(job) not in SINGLE:
        SINGLE[repr(job)] = pool.run(train_vision, job, world=1)[0]
    return SINGLE[repr(job)]


def check(pool: Pool, job: VisionJob, world: int, tolerance: float = 1e-6) -> list[Seen]:
    """Every rank against one process."""
    tolerance = max(tolerance, 2e-5) if job.dtype == torch.float32 else tolerance
    one, outcomes = single(pool, alone(job)), pool.run(train_vision, job, world=world)
    assert one.gradients.keys() == {name for many in outcomes for name in many.gradients}
    for rank, many in enumerate(outcomes):
        for step, (mine, theirs) in enumerate(zip(many.results, one.results, strict=True)):
            assert mine.loss == pytest.approx(theirs.loss, rel=tolerance), (rank, step)
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=tolerance), (rank, step)
        for name, grad in many.gradients.items():
            error = (grad - one.gradients[name]).norm() / one.gradients[name].norm().clamp(min=1e-6)
            assert error < tolerance, f"gradient of {name} on rank {rank}: {error:.1e}"
        for name, weight in many.after.items():
            error = (weight - one.after[name]).norm() / one.after[name].norm().clamp(min=1e-3)
            assert error < 100 * tolerance, f"{name} after the step on rank {rank}: {error:.1e}"
    return outcomes


def job_of(options: dict[str, Any], **changes: Any) -> VisionJob:
    if options.items() >= WHOLE.items():
        changes = {"dtype": torch.float32} | changes | {"lr": 0.0}
    return VisionJob(ParallelConfig(**{"cp_chunks": 2} | options), **changes)


def slow(*values: Any, name: str) -> Any:
    """A case of the wide matrix."""
    return pytest.param(*values, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        pytest.param(ZERO_3, MIXED, id="dp"),
        pytest.param(ZERO_3, EARLY, id="dp, early"),
        pytest.param({"tp": 2}, MIXED, id="tp"),
        pytest.param({"cp": 2}, MIXED, id="cp"),
        pytest.param({"cp": 2}, NONE, id="cp, no images"),
        slow(ZERO_3, FIRST, name="dp, one rank"),
        slow({"cp": 2}, FIRST, name="cp, one row"),
        slow({"tp": 2}, NONE, name="tp, no images"),
        slow(ZERO_3, NONE, name="dp, no images"),
    ],
)
def test_two_ranks(pool: Pool, options: dict[str, Any], shown: tuple[Any, ...]) -> None:
    check(pool, job_of(options, shown=shown), 2)


@pytest.mark.parametrize(
    "options", [WHOLE, {"pp": 2}, {"activation_checkpoint": "block", "sync_every_micro_batch": True}], ids=str
)
def test_more_ways_of_two_ranks(pool: Pool, options: dict[str, Any]) -> None:
    check(pool, job_of(options), 2)


@pytest.mark.parametrize("options", [{"cp": 2, "tp": 2}, slow({"cp": 2, "pp": 2}, name="cp, pp")], ids=str)
def test_four_ranks(pool: Pool, options: dict[str, Any]) -> None:
    check(pool, job_of(options), 4)


@pytest.mark.parametrize("options", [{"ep": 2}, slow({"tp": 2, "etp": 2}, name="tp, etp")], ids=str)
def test_experts(pool: Pool, options: dict[str, Any]) -> None:
    """In fp32, as grouped products are."""
    check(pool, job_of(options, model=EXPERTS, dtype=torch.float32), 2, 1e-4)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        pytest.param(WHOLE, TEXT, id="whole weights, text"),
        pytest.param({"tp": 2}, (TOWER,), id="tp, tower"),
        pytest.param({"pp": 2}, TEXT, id="pp, text"),
        slow(ZERO_3, (TOWER,), name="dp, tower"),
        slow(ZERO_3, TEXT, name="dp, text"),
        slow(WHOLE, (TOWER, PROJECTOR), name="whole weights, eyes"),
        slow({"tp": 2}, TEXT, name="tp, text"),
        slow({"tp": 2}, (TOWER, PROJECTOR), name="tp, eyes"),
        slow({"pp": 2}, (TOWER,), name="pp, tower"),
        slow({"pp": 2}, (TOWER, PROJECTOR), name="pp, eyes"),
    ],
)
def test_frozen_parts(pool: Pool, options: dict[str, Any], frozen: tuple[str, ...]) -> None:
    outcomes = check(pool, job_of(options, shown=EARLY, frozen=frozen, steps=2, lr=1e-3), 2)
    assert all(len(many.results) == 2 for many in outcomes)


@pytest.mark.parametrize("options", [WHOLE, slow(ZERO_3, name="sharded")], ids=str)
def test_eyes_alone_are_trained_and_there_is_no_image(pool: Pool, options: dict[str, Any]) -> None:
    check(pool, job_of(options, shown=NONE, frozen=TEXT), 2)


def test_balance_is_told_and_changes_no_result(pool: Pool) -> None:
    """All images are on one of two ranks: unless they are shared out, it looks at twice the mean."""
    shown = (MIXED[0], ())
    job = job_of(ZERO_3, shown=shown)
    even, own = (check(pool, replace(job, parallel=replace(job.parallel, balance_images=one)), 2)
                 for one in (True, False))  # fmt: skip
    assert [many[0].results[0].image_balance for many in (even, own)] == [pytest.approx(8 / 7), 2.0]


SCHEDULES: dict[str, dict[str, Any]] = {
    "interleaved": {"pp": 2, "pp_chunks": 2, "pp_schedule": "interleaved"},
    "zero bubble": {"pp": 2, "pp_schedule": "zero_bubble"},
    "zero bubble, chunks": {"pp": 2, "pp_chunks": 2, "pp_schedule": "zero_bubble"},
}


@pytest.mark.parametrize(
    "name", ["zero bubble", *(slow(name, name=name) for name in ("interleaved", "zero bubble, chunks"))]
)
def test_schedules_of_pipelines(pool: Pool, name: str) -> None:
    deep = replace(VL, num_layers=4, layer_pattern="LLLS")
    check(pool, job_of(SCHEDULES[name], shown=EARLY, model=deep), 2)


@pytest.mark.slow
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("shown", [MIXED, FIRST, LAST, EARLY], ids=["mixed", "one rank", "last", "early"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tp": 2}, {"cp": 2}, {"cp": 4, "cp_table": "zigzag"}, {"cp": 2, "tp": 2}, {"tp": 4}, {"pp": 2},
     WHOLE | {"micro_batch_rows": 2}, {"activation_checkpoint": "block", "tp": 2}],
    ids=str,
)  # fmt: skip
def test_four_ranks_of_any_layout(pool: Pool, options: dict[str, Any], shown: tuple[Any, ...], balance: bool) -> None:
    check(pool, job_of({"balance_images": balance} | options, shown=shown, rows=8), 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("frozen", [(), (TOWER,), TEXT], ids=["nothing", "tower", "text"])
def test_schedules_with_frozen_parts(pool: Pool, name: str, frozen: tuple[str, ...]) -> None:
    deep = replace(VL, num_layers=4, layer_pattern="LLLS")
    check(pool, job_of(SCHEDULES[name] | {"cp": 2}, model=deep, frozen=frozen, steps=2), 4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [WHOLE, ZERO_3, {"cp": 2}], ids=str)
def test_layers_that_images_do_not_go_through(pool: Pool, options: dict[str, Any]) -> None:
    model = replace(VL, vision=replace(EYES, unused_layers=1, keep_class_token=True, grids=[]))
    check(pool, job_of(options, model=model, shown=(((3, 14, 14), (20, 28, 28)), ()), steps=2, lr=1e-3), 2)
