"""Whole weights that a run chooses: where a phase would run from graphs and fits, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.parallel.mesh import World
from mmtrain.train.plan_run import PlannedRun, plan_run
from mmtrain.train.plan_table import plan_lines

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = "cluster.device_memory_gib=80"


def planned(world: int, *overrides: str) -> PlannedRun:
    given = ["data.path=x", "run.name=r", *overrides]
    given = given if any("stage=" in one for one in given) else [*given, "stage=pretrain"]
    given = given if any("model=" in one for one in given) else [*given, "model=hybrid_410m"]
    return plan_run(compose(given, CONFIGS), world, torch.device("cpu"))


def whole(found: PlannedRun) -> list[bool]:
    return [not laid.parallel.reshards for laid in found.layouts]


def test_a_phase_that_fits_keeps_whole_weights_and_says_so() -> None:
    found = planned(8, LARGE)
    assert whole(found) == [True] and found.memory.works[0].records_graphs
    (line,) = found.choices
    assert line.startswith("whole   pretrain_8k: every rank keeps all weights") and line in plan_lines(found)
    assert f"{found.memory.predictions[0].gib:.1f} GiB" in line and line.endswith("of 80.0")
    # What it takes beside: bf16 copies, fp32 sums and shards of gradients, where ZeRO-3 has a layer's.
    sharded = planned(8, LARGE, "parallel.reshard_after_forward=true")
    assert whole(sharded) == [False] and sharded.choices == []
    for part, times in (("gathered", 1.5), ("gradients", 1.1)):
        assert found.memory.predictions[0].parts[part] > times * sharded.memory.predictions[0].parts[part]


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, [LARGE]),  # has all of them anyway
        (8, []),  # no memory is known
        (8, ["cluster.device_memory_gib=19.5"]),  # whole it needs 16.4 GiB and 3.5 of margin, sharded 15.5
        (8, [LARGE, "model=hybrid_7b", "parallel.activation_checkpoint=block"]),  # fits, and gains nothing
        (8, [LARGE, "stage=quickstart", "model=proxy_100m"]),  # 1,024 tokens a rank and step
        (8, [LARGE, "parallel.tp=2"]),
        (8, [LARGE, "parallel.cp=2"]),
        (8, [LARGE, "parallel.pp=2"]),
        (8, [LARGE, "model=minimax_text_01", "parallel.ep=8"]),
        (8, [LARGE, "parallel.cuda_graphs=false"]),
        (8, [LARGE, "parallel.activation_checkpoint=selective"]),
        (8, [LARGE, "parallel.sync_every_micro_batch=true"]),
        (8, [LARGE, "optim=cpu_offload"]),
        (8, [LARGE, "parallel.reshard_after_forward=true"]),
    ],
    ids=str,
)
def test_others_shard(world: int, options: list[str]) -> None:
    found = planned(world, *options)
    assert not any(whole(found)) and not [line for line in found.choices if line.startswith("whole")]


def test_long_rows_shard_and_phases_choose_for_themselves() -> None:
    found = planned(8, LARGE, "stage=curriculum", "parallel.activation_checkpoint=block")
    assert whole(found) == [True, False, False, False]
    assert [line.split()[0] for line in found.choices if line.startswith("whole")] == ["whole"]
    own = planned(8, LARGE, "stage=curriculum", "parallel.activation_checkpoint=block",
                  "stage.phases.0.parallel={reshard_after_forward: true}")  # fmt: skip
    assert whole(own) == [False] * 4


def test_what_is_given_stays() -> None:
    found = planned(8, "cluster.device_memory_gib=21", "parallel.reshard_after_forward=false")
    assert whole(found) == [True] and found.choices == []
    with pytest.raises(ConfigError, match=r"parallel\.reshard_after_forward=sometimes"):
        planned(8, "parallel.reshard_after_forward=sometimes")


def test_ranks_that_choose_differently_are_refused() -> None:
    world = World(torch.device("cpu"), 1.0, None)
    mine, main = planned(8, LARGE, "parallel.cuda_graphs=false"), planned(8, LARGE)
    told: list[str] = []
    object.__setattr__(world, "of_main", lambda name, text: told.append(text) or told[0])
    main.check_same_on_all(world)
    with pytest.raises(ConfigError, match=r"this rank plans .*, the main process .*whole weights"):
        mine.check_same_on_all(world)
