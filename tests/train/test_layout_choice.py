"""Layouts of runs whose number of processes has changed: the nearest that runs, and what is told of it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.train.layout_choice import fit_layouts
from mmtrain.train.plan_run import PlannedRun, plan_run

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs"
AXES = ("tp", "etp", "cp", "pp", "ep")


def config(*overrides: str) -> PretrainConfig:
    return compose(["data.path=x", "run.name=r", "stage=quickstart", "model=moe_28b", "parallel=auto", *overrides],
                   CONFIGS)  # fmt: skip


def planned(world: int, *overrides: str) -> PlannedRun:
    return plan_run(config(*overrides), world, CPU)


def axes(found: PlannedRun) -> tuple[int, ...]:
    (laid,) = found.layouts
    return tuple(getattr(laid.layout, axis) for axis in AXES)


def parallel(tp: int = 1, etp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1) -> list[str]:
    sizes = zip(AXES, (tp, etp, cp, pp, ep), strict=True)
    return [f"parallel.{axis}={size}" for axis, size in sizes]


@pytest.mark.parametrize(
    ("world", "given", "expected"),
    [
        (8, dict(tp=2, ep=4), (2, 1, 1, 1, 4)),  # as it was asked for
        (16, dict(tp=2, ep=4), (2, 1, 1, 1, 4)),  # more replicas
        (4, dict(tp=4, ep=8), (4, 1, 1, 1, 4)),  # experts give way, tensor parallelism stays
        (2, dict(tp=4, ep=8), (2, 1, 1, 1, 2)),
        (1, dict(tp=4, ep=8, pp=2), (1, 1, 1, 1, 1)),
        (4, dict(tp=2, pp=4, ep=2), (2, 1, 1, 2, 2)),  # then the pipeline
        (4, dict(tp=4, etp=4, ep=4), (4, 4, 1, 1, 1)),
        (8, dict(tp=2, cp=4, pp=2, ep=4), (2, 1, 4, 1, 4)),  # context parallelism is kept longer
    ],
    ids=str,
)
def test_the_nearest_layout_is_taken(world: int, given: dict[str, int], expected: tuple[int, ...]) -> None:
    found = planned(world, *parallel(**given))
    assert axes(found) == expected
    asked = tuple(given.get(axis, 1) for axis in AXES)
    moved = [f"{axis} {before} -> {now}" for axis, before, now in zip(AXES, asked, expected, strict=True)
             if before != now]  # fmt: skip
    lines = [line for line in found.choices if line.startswith("fit ")]
    assert lines == ([f"fit     quickstart: {', '.join(moved)}, for {world} processes"] if moved else [])
    assert found.plan.phases[0].used_rows() == planned(1, *parallel()).plan.phases[0].used_rows()  # the batch stays


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4, 8])
def test_no_nearer_layout_would_run(world: int) -> None:
    """By trying all of them, without the option."""
    asked = dict(tp=4, etp=2, cp=2, pp=2, ep=8)
    found = axes(planned(world, *parallel(**asked)))
    for sizes in product(*([one for one in range(size, 0, -1) if size % one == 0] for size in asked.values())):
        try:
            plan_run(config("parallel.fit=false", *parallel(*sizes)), world, CPU)
        except ConfigError:
            continue
        assert sizes == found
        break


def test_a_layout_that_memory_cannot_hold_is_passed_over() -> None:
    """It takes nearer ones that are too large only where nothing else runs."""
    given = parallel(tp=8, pp=2, ep=8)
    roomy, tight = (planned(8, *given, f"cluster.device_memory_gib={memory}") for memory in (1000, 90))
    assert axes(roomy)[0] == 8
    with pytest.raises(ConfigError, match=r"cannot hold|does not fit|needs"):
        planned(8, *given, "cluster.device_memory_gib=1").memory.check()
    tight.memory.check()


def test_each_phase_gets_its_own() -> None:
    own = ["stage.phases.1.parallel={tp: 8}", "stage.phases.2.parallel={cp: 4, tp: 2}"]
    given = ["data.path=x", "run.name=r", "stage=long_ctx", "model=hybrid_1b", "parallel=auto", *own]
    found = plan_run(compose(given, CONFIGS), 4, CPU)
    assert [(laid.layout.tp, laid.layout.cp) for laid in found.layouts] == [(1, 1), (4, 1), (2, 2)]
    assert [line for line in found.choices if line.startswith("fit")] == [
        "fit     ctx_512k: tp 8 -> 4, for 4 processes", "fit     ctx_1m: cp 4 -> 2, for 4 processes",
    ]  # fmt: skip


def test_without_the_option_nothing_changes_and_what_cannot_run_is_told_as_ever() -> None:
    given = config("parallel.fit=false", *parallel(tp=4, ep=8))
    assert fit_layouts(given, 2, CPU) == (given, [])
    with pytest.raises(ConfigError, match=r"parallel\.tp=4"):
        plan_run(given, 2, CPU)
    with pytest.raises(ConfigError, match="are not a multiple of 3"):  # 16 rows on 3 processes: no layout helps
        planned(3)
