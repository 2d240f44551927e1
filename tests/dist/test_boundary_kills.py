"""Runs that are killed at each moment of a boundary between layouts: to the last bit the run that was left alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmtrain.checkpoint.listing import all_checkpoints, step_of
from tests.dist.kill_launcher import BOUNDARIES
from tests.dist.runs import environment, pretrain, steps
from tests.dist.test_phase_layouts import OPTIONS, told
from tests.dist.warm import run_script

STEPS, CROSSED = 16, 3  # of the run, and boundaries in it
QUICK = {"a layout is left"}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    pretrain(*OPTIONS, f"data.path={corpus}", f"run.dir={folder}", processes=2)
    return folder / "run"


@pytest.mark.parametrize("moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in BOUNDARIES])
def test_a_kill_at_each_moment_of_a_boundary(whole: Path, corpus: Path, tmp_path: Path, moment: str) -> None:
    draw = random.Random(moment)
    options = [*OPTIONS, f"data.path={corpus}", f"run.dir={tmp_path}", "run.resume=auto"]
    kill = f"{moment}:{draw.randint(1, CROSSED)}:{draw.choice(['0', '1', 'all'])}"
    done = run_script("tests/dist/kill_launcher.py", options, environment() | {"KILL": kill}, 2, timeout=120)
    assert done.returncode == -9, f"{kill}: {done.returncode}\n{done.stderr[-4000:]}"
    named = all_checkpoints(tmp_path / "run/checkpoints")
    done = pretrain(*options, processes=2)
    assert f"after step {step_of(named[-1]):,}" in done.stdout + done.stderr  # nothing that had its name is lost
    mine, theirs = ([one for one in told(run) if "layout" not in one] for run in (tmp_path / "run", whole))
    assert [record["step"] for record in steps(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert mine == theirs
    for folder in (".", "checkpoints"):  # no litter
        names = [sorted(path.name for path in (run / folder).iterdir()) for run in (tmp_path / "run", whole)]
        assert names[0] == names[1]
