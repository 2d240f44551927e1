"""Runs that are killed at any moment and started again: to the last bit the run that was left alone."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmtrain.checkpoint.listing import all_checkpoints, step_of
from mmtrain.checkpoint.manifest import file_sum
from tests.dist.kill_launcher import MOMENTS, OF_MAIN
from tests.dist.runs import SMALL, environment, pretrain, records, steps
from tests.dist.test_runs import exact
from tests.dist.warm import run_script

STEPS, SEEDED, ALL_RANKS, ELASTIC = 8, 20, 6, 6
SAME = ("step", "tokens", "first_row", "rows", "lr")
QUICK = {"a file is half written"}


@dataclass(frozen=True)
class Uninterrupted:
    """A run of two ranks that saves after every step."""

    run: Path
    options: list[str]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    folder = tmp_path_factory.mktemp("whole")
    options = [*SMALL, f"data.path={corpus}", "run.name=r", "checkpoint.interval=1", "checkpoint.keep=2"]
    pretrain(*options, f"run.dir={folder}", processes=2)
    return Uninterrupted(folder / "r", options)


def killed(
    whole: Uninterrupted, folder: Path, moment: str, count: int, rank: int | str, *more: str, processes: int = 2
) -> int:
    """Launch, die, and return the step of the newest checkpoint that had its name by then."""
    given = [*whole.options, f"run.dir={folder}", "run.resume=auto", *more]
    told = {**environment(), "KILL": f"{moment}:{count}:{rank}"}
    done = run_script("tests/dist/kill_launcher.py", given, told, processes, timeout=120)
    assert done.returncode == -9, f"{moment} {count} {rank}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    found = all_checkpoints(folder / "r/checkpoints")
    return step_of(found[-1]) if found else 0


def finish(whole: Uninterrupted, folder: Path, newest: int, *more: str, processes: int = 2) -> None:
    """Go on to the end, from that checkpoint: nothing that had its name is lost, and nothing is left lying about."""
    done = pretrain(*whole.options, f"run.dir={folder}", "run.resume=auto", *more, processes=processes)
    begun = re.search(r"resumed from \S+ after step ([\d,]+)", done.stdout + done.stderr)
    assert (int(begun[1]) if begun else 0) == newest
    run = folder / "r"
    assert [record["step"] for record in steps(run)] == list(range(1, STEPS + 1))
    names = [sorted(path.name for path in (one / "checkpoints").iterdir()) for one in (run, whole.run)]
    assert names[0] == names[1]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.run.iterdir())


def check(whole: Uninterrupted, folder: Path, kills: list[tuple[str, int, int | str]]) -> None:
    newest = 0
    for moment, count, rank in kills:
        newest = killed(whole, folder, moment, count, rank)
    finish(whole, folder, newest)
    run = folder / "r"
    assert exact(run) == exact(whole.run)
    assert records(run)[-1]["val_loss"] == records(whole.run)[-1]["val_loss"]
    for mine, theirs in zip(*(all_checkpoints(one / "checkpoints") for one in (run, whole.run)), strict=True):
        for name in ("rank-00000.safetensors", "rank-00001.safetensors", "tensors.json"):
            assert file_sum(mine / name) == file_sum(theirs / name)


@pytest.mark.parametrize("moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_a_kill_at_each_moment(whole: Uninterrupted, tmp_path: Path, moment: str) -> None:
    check(whole, tmp_path, [(moment, 2, 0 if moment in OF_MAIN else 1)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDED))
def test_kills_at_random_moments(whole: Uninterrupted, tmp_path: Path, seed: int) -> None:
    """Up to two, the second after the run has gone on."""
    draw = random.Random(seed)
    kills = []
    for _ in range(1 + seed % 2):
        moment = draw.choice(list(MOMENTS))
        kills.append((moment, draw.randint(1, 3), 0 if moment in OF_MAIN else draw.randint(0, 1)))
    check(whole, tmp_path, kills)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ALL_RANKS))
def test_kills_of_all_ranks_at_one_moment(whole: Uninterrupted, tmp_path: Path, seed: int) -> None:
    draw = random.Random(100 + seed)
    moments = [moment for moment in MOMENTS if moment not in OF_MAIN]
    check(whole, tmp_path, [(draw.choice(moments), draw.randint(1, 3), "all") for _ in range(1 + seed % 2)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ELASTIC))
def test_kills_of_runs_that_come_back_with_other_processes(whole: Uninterrupted, tmp_path: Path, seed: int) -> None:
    """Each launch has one, two or four: the rows are the same, and what is learned is the same but for rounding."""
    draw, newest, more = random.Random(200 + seed), 0, ["parallel=auto", "parallel.ep=2"]
    for _ in range(2):
        moment, world = draw.choice(list(MOMENTS)), draw.choice([1, 2, 4])
        rank = 0 if moment in OF_MAIN else draw.randrange(world)
        newest = killed(whole, tmp_path, moment, draw.randint(1, 2), rank, *more, processes=world)
    finish(whole, tmp_path, newest, *more, processes=draw.choice([1, 2, 4]))
    for mine, theirs in zip(steps(tmp_path / "r"), steps(whole.run), strict=True):
        assert [mine[key] for key in SAME] == [theirs[key] for key in SAME]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]
    ends = [records(run)[-1]["val_loss"] for run in (tmp_path / "r", whole.run)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
