"""Tasks of an srun step are the ranks of one run, told of a mistake once; other launchers are refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.dist.pool import free_port
from tests.dist.runs import ROOT, SMALL, environment, pretrain, steps

NO_LAUNCHER = {name: text for name, text in environment().items() if not name.startswith(("SLURM_", "OMPI_", "PMI_"))}


def srun(*overrides: str, tasks: int = 2, late: Mapping[int, int] = MappingProxyType({})) -> list[tuple[int, str, str]]:
    """Start launch/pretrain.py as srun starts the tasks of a step on this host; exit code, stdout, stderr of each.

    Args:
        overrides: of the command line.
        tasks: how many.
        late: seconds after which a task starts.
    """
    step = {
        **{name: text for name, text in NO_LAUNCHER.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_NTASKS": str(tasks), "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_STEP_NODELIST": "here",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    started = [
        subprocess.Popen(["sh", "-c", f'sleep {late.get(rank, 0)}; exec "$@"', "sh",
                          sys.executable, "launch/pretrain.py", *overrides], cwd=ROOT, text=True,
                         env={**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(tasks)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *both) for process, both in zip(started, said, strict=True)]


@pytest.mark.slow
def test_tasks_of_a_step_train_one_run(corpus: Path, tmp_path: Path) -> None:
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.max_steps=2", "data.valid_rows=0"]
    done = srun("-m", *common, "run.name=1_0,2_0")  # two points: the ranks meet twice
    assert [code for code, _, _ in done] == [0, 0], done
    first, second = (steps(tmp_path / name) for name in ("1_0", "2_0"))
    assert [row["step"] for row in first] == [1, 2]  # not once for each task
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


@pytest.mark.parametrize(
    ("wrong", "late"),
    [
        ("model.top_k=9", {}),
        pytest.param("data.path=/not/there", {}, marks=pytest.mark.slow),
        pytest.param("data.path=/not/there", {0: 12}, marks=pytest.mark.slow),  # tasks of a full machine came so late
        pytest.param("data.path=/not/there", {1: 12}, marks=pytest.mark.slow),
    ],
)
def test_a_mistake_of_a_step_is_told_once(corpus: Path, tmp_path: Path, wrong: str, late: dict[int, int]) -> None:
    done = srun(*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=x", wrong, late=late)
    lines = [line for _, _, errors in done for line in errors.splitlines()]
    assert [code for code, _, _ in done] == [2, 2] and len(lines) == 1 and lines[0].startswith("error: ")
    assert not os.listdir(tmp_path)


def test_torchrun_s_report_ends_with_the_line(tmp_path: Path) -> None:
    done = pretrain("model.top_k=9", "data.path=x", "run.name=x", processes=2, check=False)
    wanted = "error: model.top_k=9: must lie between 1 and num_experts=8; lower it or add experts"
    lines = done.stderr.splitlines()
    assert lines[0].endswith(wanted) or wanted in lines
    assert [line for line in lines if line.strip()][-2] == f"  traceback : {wanted}"


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "2"}, "error: WORLD_SIZE=2: set without RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "error: OMPI_COMM_WORLD_SIZE=2: mpirun started 2"),
    ],
)
def test_other_launchers_are_refused_in_one_line(variables: dict[str, str], line: str) -> None:
    done = subprocess.run([sys.executable, "launch/pretrain.py", "data.path=x", "run.name=x"], cwd=ROOT, text=True,
                          env={**NO_LAUNCHER, **variables}, capture_output=True)  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(line)
