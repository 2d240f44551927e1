"""Context parallelism that a run chooses: the least that runs and fits, what is told of it, and what a resume keeps."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmtrain.checkpoint.run_folder import RunFolder, Start
from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.parallel.mesh import World
from mmtrain.train.cp_choice import choose_cp
from mmtrain.train.plan_run import PlannedRun, plan_run
from mmtrain.train.plan_table import plan_lines
from mmtrain.train.prepared_run import PreparedRun
from mmtrain.train.resume import decide_start, recorded_cp
from tests.checkpoint.fake import checkpoint

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs"


def config(*overrides: str) -> PretrainConfig:
    return compose(["data.path=x", "run.name=r", "stage=long_ctx", *overrides], CONFIGS)


def planned(world: int, *overrides: str, kept: tuple[int | None, ...] = ()) -> PlannedRun:
    return plan_run(config(*overrides), world, CPU, kept)


def sizes(found: PlannedRun) -> list[int]:
    return [laid.layout.cp for laid in found.layouts]


@pytest.mark.parametrize(
    ("world", "cps"),
    [(1, [1, 1, 1]), (2, [1, 1, 1]), (8, [1, 1, 1]), (32, [1, 1, 1]), (64, [1, 1, 2]), (128, [1, 2, 4])],
)
def test_every_process_has_rows_to_work_on_where_no_memory_is_known(world: int, cps: list[int]) -> None:
    found = planned(world)
    assert sizes(found) == cps and len(found.choices) == sum(cp > 1 for cp in cps)
    assert all("cp=1 " in line and f"are not a multiple of {world}" in line for line in found.choices)


def test_a_phase_takes_the_least_that_fits_with_its_margin() -> None:
    found = planned(8, "cluster.device_memory_gib=80")
    assert sizes(found) == [1, 1, 2]
    assert found.choices == ["cp      ctx_1m: cp=2, the least that fits 80.0 GiB: 43.3 GiB and 4.3 of margin "
                             "predicted; cp=1 needs 86.0 GiB and 5.6 of margin"]  # fmt: skip
    assert found.choices[0] in plan_lines(found)
    assert sizes(planned(8, "cluster.device_memory_gib=30")) == [1, 2, 4]
    # 43.1 GiB do not fit 45 with their margin, though they are less.
    assert sizes(planned(8, "cluster.device_memory_gib=45")) == [1, 2, 4]


def test_what_is_given_is_taken_as_it_is() -> None:
    small = "cluster.device_memory_gib=30"
    found = planned(8, small, "parallel.cp=1")
    assert sizes(found) == [1, 1, 1] and not found.choices
    with pytest.raises(ConfigError, match="ctx_1m needs"):
        found.memory.check()
    assert sizes(planned(8, small, "parallel.cp=8")) == [8, 8, 8]
    assert sizes(planned(8, small, "stage.phases.1.parallel={cp: 1}")) == [1, 1, 4]
    assert sizes(planned(8, small, "parallel.cp=1", "stage.phases.2.parallel={cp: auto}")) == [1, 1, 4]


def test_other_options_of_a_phase_count_in_its_choice() -> None:
    own = "stage.phases.2.parallel={activation_checkpoint: block}"
    assert sizes(planned(8, "cluster.device_memory_gib=30", own)) == [1, 2, 1]
    assert planned(8, own).layouts[2].parallel.activation_checkpoint == "block"


def test_where_none_fits_all_phases_are_refused_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        planned(2, "model=hybrid_1b", "cluster.device_memory_gib=6").memory.check()
    assert "\n" not in str(refused.value) and "ctx_512k needs" in str(refused.value)
    with pytest.raises(ConfigError, match=r"256 rows of 131072 tokens are not a multiple of 3"):
        planned(3)


def test_numbers_stand_in_the_options_afterwards() -> None:
    made, _ = choose_cp(config("cluster.device_memory_gib=80"), 8, CPU)
    assert made.parallel.cp == 1
    assert [one.parallel.cp if one.parallel else None for one in made.stage.phases] == [None, None, 2]
    again, told = choose_cp(made, 8, CPU)
    assert again == made and told == []
    one, _ = choose_cp(
        compose(["data.path=x", "run.name=r", "stage=long_ctx_1m", "cluster.device_memory_gib=80"], CONFIGS), 8, CPU
    )
    assert one.parallel.cp == 2 and one.stage.phases[0].parallel is None


def test_a_resumed_run_keeps_what_was_chosen(tmp_path: Path) -> None:
    """On a device of other memory too; another number may be given, as any other layout may."""
    given = [f"run.dir={tmp_path}", "run.resume=auto"]
    made = planned(8, "cluster.device_memory_gib=80", *given).config
    checkpoint(tmp_path / "r/checkpoints/step-00000003", made)
    now = config("cluster.device_memory_gib=200", *given)
    assert recorded_cp(now) == [1, 1, 2]
    found = plan_run(now, 8, CPU, recorded_cp(now))
    assert sizes(found) == [1, 1, 2] and found.choices == ["cp      ctx_1m: cp=2, as in the checkpoint"]
    assert decide_start(found.config, RunFolder(found.config)).resume is not None
    for cp in (2, 4):
        typed = plan_run(config(f"stage.phases.2.parallel={{cp: {cp}}}", *given), 8, CPU, recorded_cp(now)).config
        assert decide_start(typed, RunFolder(typed)).resume is not None
    bound = config("stage.phases.2.parallel={micro_batch_rows: 2}", *given)
    with pytest.raises(ConfigError, match=r"stage.phases\[2\].parallel.micro_batch_rows=2: .* was trained with"):
        decide_start(bound, RunFolder(bound))
    assert recorded_cp(config(f"run.dir={tmp_path}")) == []  # a run of its own


def test_what_was_chosen_is_chosen_anew_where_it_no_longer_runs(tmp_path: Path) -> None:
    """On other processes, or devices of less memory; what still runs is kept."""
    given = [f"run.dir={tmp_path}", "run.resume=auto"]
    made = planned(8, "cluster.device_memory_gib=80", *given).config
    checkpoint(tmp_path / "r/checkpoints/step-00000003", made)
    for processes, memory, expected in ((8, 80, [1, 1, 2]), (16, 80, [1, 1, 2]), (128, 200, [1, 2, 4]), (8, 30, None)):
        now = config(f"cluster.device_memory_gib={memory}", *given)
        kept, anew = plan_run(now, processes, CPU, recorded_cp(now)), plan_run(now, processes, CPU)
        assert sizes(kept) == (sizes(anew) if expected is None else expected), (processes, memory, sizes(kept))


def test_a_checkpoint_from_before_there_was_a_choice_is_gone_on_from_with_1(tmp_path: Path) -> None:
    given = [f"run.dir={tmp_path}", "run.resume=auto"]
    recorded = asdict(config("parallel.cp=1"))
    checkpoint(tmp_path / "r/checkpoints/step-00000003", recorded)
    now = config("cluster.device_memory_gib=200", *given)
    found = plan_run(now, 8, CPU, recorded_cp(now))
    assert sizes(found) == [1, 1, 1]
    assert decide_start(found.config, RunFolder(found.config)).resume is not None
    del recorded["parallel"]["cp"]
    checkpoint(tmp_path / "old/checkpoints/step-00000003", recorded)
    old = config(*given, "run.name=old")
    assert recorded_cp(old) == [1, 1, 1]
    without = plan_run(old, 8, CPU, recorded_cp(old)).config
    assert decide_start(without, RunFolder(without)).resume is not None


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """Make this process one of torchrun's."""
    told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_that_plan_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    for rank, memory in ((0, 80), (1, 80), (2, 30)):
        as_rank(monkeypatch, rank, 4)
        world, mine = World(CPU, 1.0, store), planned(4, f"cluster.device_memory_gib={memory}")
        if rank < 2:
            mine.check_same_on_all(world)
        else:
            with pytest.raises(ConfigError, match="their devices' memory differs"):
                mine.check_same_on_all(world)
    planned(4).check_same_on_all(replace(world, store=None))


def test_ranks_that_see_other_checkpoints_lay_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process sees no checkpoint, rank 1 one of the last phase, whose layout is another."""
    store = dist.HashStore()
    found, first = planned(64), []
    assert sizes(found) == [1, 1, 2]
    for rank, phase in ((0, 0), (1, 2)):
        as_rank(monkeypatch, rank, 64)
        run = PreparedRun(found, RunFolder(found.config), Start(), None, None, (), phase)
        first.append(run.first_layout(World(CPU, 1.0, store)))
    assert first == [found.layouts[0].layout] * 2
    assert run.first_layout(World(CPU, 1.0, None)) == found.layouts[2].layout  # alone, it is the main process


def test_phases_of_one_layout_have_the_same_stages() -> None:
    found = planned(4, "parallel.pp=2", "model.num_layers=6", "parallel.cp=1")
    assert found.layouts[0] == found.layouts[2] and len(found.layouts[0].stages) == 2
    assert all(work.stages == found.layouts[0].stages for work in found.memory.works)
