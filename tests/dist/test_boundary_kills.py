"""Runs of phases with layouts of their own that are killed, at each moment of a boundary and at any other: to the last
bit the run that was left alone.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmtrain.checkpoint.listing import all_checkpoints, step_of
from tests.dist.kill_launcher import BOUNDARIES, MOMENTS, OF_MAIN
from tests.dist.runs import environment, pretrain, steps
from tests.dist.test_phase_layouts import OPTIONS, told
from tests.dist.warm import run_script

STEPS, SAVES, CROSSED, SEEDED = 16, 7, 3, 8  # steps of the run, its saves but the last, boundaries in it, and draws
REMOVING = {"an old one is half removed", "old ones are removed"}  # this run keeps all of its checkpoints


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    pretrain(*OPTIONS, f"data.path={corpus}", f"run.dir={folder}", processes=2)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("moment", BOUNDARIES)
def test_a_kill_at_each_moment_of_a_boundary(whole: Path, corpus: Path, tmp_path: Path, moment: str) -> None:
    draw = random.Random(moment)
    check(whole, corpus, tmp_path, [f"{moment}:{draw.randint(1, CROSSED)}:{draw.choice(['0', '1', 'all'])}"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDED))
def test_kills_at_random_moments_of_phases_with_layouts(whole: Path, corpus: Path, tmp_path: Path, seed: int) -> None:
    """Up to two, the second after the run has gone on. No step is further from a boundary than three."""
    draw, kills = random.Random(seed), []
    for steps_left, saves_left in ((STEPS, SAVES), (1, 1))[: 1 + seed % 2]:
        moment = draw.choice(sorted(MOMENTS.keys() - REMOVING))
        most = steps_left if moment.startswith("a step") else saves_left
        kills.append(f"{moment}:{draw.randint(1, most)}:{0 if moment in OF_MAIN else draw.choice(['0', '1', 'all'])}")
    check(whole, corpus, tmp_path, kills)


def check(whole: Path, corpus: Path, folder: Path, kills: list[str]) -> None:
    """Die at each of the moments in turn and go on to the end: all is as in the run that was left alone."""
    options, before = [*OPTIONS, f"data.path={corpus}", f"run.dir={folder}", "run.resume=auto"], 0
    for kill in kills:
        done = run_script("tests/dist/kill_launcher.py", options, environment() | {"KILL": kill}, 2, timeout=120)
        assert done.returncode == -9, f"{kill}: {done.returncode}\n{done.stderr[-4000:]}"
        named = all_checkpoints(folder / "run/checkpoints")
        before = step_of(named[-1]) if named else 0
    done = pretrain(*options, processes=2)
    if before:
        assert f"after step {before:,}" in done.stdout + done.stderr  # nothing that had its name is lost
    mine, theirs = ([one for one in told(run) if "layout" not in one] for run in (folder / "run", whole))
    assert [record["step"] for record in steps(folder / "run")] == list(range(1, STEPS + 1))
    assert mine == theirs
    for part in (".", "checkpoints"):  # no litter
        names = [sorted(path.name for path in (run / part).iterdir()) for run in (folder / "run", whole)]
        assert names[0] == names[1]
