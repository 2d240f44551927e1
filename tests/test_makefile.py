"""The number of processes that `make pretrain` starts follows the machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def quickstart(folder: Path, gpus: int | None, cores: int, *given: str, **variables: str) -> tuple[int, int]:
    """Processes and rows a process that `make -n pretrain` has with so many GPUs (None: no nvidia-smi) and cores."""
    scripts = {"getconf": f"echo {cores}"}
    if gpus is not None:
        scripts["nvidia-smi"] = "\n".join([f"echo 'GPU {i}: X (UUID: GPU-{i})'" for i in range(gpus)] or ["exit 9"])
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PATH": f"{folder}:{environment['PATH']}", **variables}
    done = subprocess.run(["make", "-n", "pretrain", "PYTHON=python", *given], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    numbers = re.search(r"--nproc-per-node (\d+) .*?micro_batch_rows=(\d+)", done.stdout, re.S)
    return int(numbers[1]), int(numbers[2])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_processes_follow_the_machine(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi") is None:
        assert quickstart(tmp_path, None, 2) == (2, 8) and quickstart(tmp_path, None, 1) == (1, 8)
    assert quickstart(tmp_path, 0, 64) == (2, 8)  # a driver without a GPU
    for gpus, expected in (
        (1, (1, 8)),
        (2, (2, 8)),
        (3, (2, 8)),
        (4, (4, 4)),
        (8, (8, 2)),
        (16, (16, 1)),
        (32, (16, 1)),
    ):
        assert quickstart(tmp_path, gpus, 64) == expected
    assert quickstart(tmp_path, 8, 64, CUDA_VISIBLE_DEVICES="3") == (1, 8)
    assert quickstart(tmp_path, 8, 64, CUDA_VISIBLE_DEVICES="") == (2, 8)
    assert quickstart(tmp_path, 8, 64, "PROCESSES=4") == (4, 4)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_each_stage_of_seeing_begins_with_the_one_before(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-n", "vl", "PYTHON=python", f"DRAWN={tmp_path}/drawn", f"VL_RUNS={tmp_path}/runs", "VL_PROCESSES=2"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = done.stdout.replace("\\\n", " ")
    runs = re.findall(r"\+stage=(\w+) .*run\.name=(\w+)", text)
    assert [stage for stage, _ in runs] == ["quickstart", "vit_drawn", "vl_drawn", "vl_dpo_drawn"]
    names = [name for _, name in runs]
    assert re.findall(rf"run\.init_from={tmp_path}/runs/(\w+)", text) == names[:-1]
    assert f"ask_images.py {tmp_path}/runs/{names[-1]} --before {tmp_path}/runs/{names[-2]} " in text
    made = re.findall(rf"--output {tmp_path}/drawn/(\w+)", text)
    read = re.findall(rf"path[=:] ?{tmp_path}/drawn/(\w+)", text)
    assert made[0] == "pictures" and set(read) == set(made[1:])
    assert "make vl: 0 s in all: corpora 0 s, text 0 s, eyes 0 s, " in re.sub(r"\d+ s", "0 s", text)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_pages_are_opened_only_where_there_is_a_browser() -> None:
    def marks(browser: str) -> list[str]:
        done = subprocess.run(
            ["make", "-n", "test-all", "PYTHON=python", f"BROWSER={browser}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return re.findall(r'-m "(.*?)"', done.stdout)

    assert marks("/usr/bin/chromium") == ["not gpu and not slow and not slurm", "slow and not gpu and not slurm"]
    assert marks("") == [
        "not gpu and not slow and not slurm and not browser",
        "slow and not gpu and not slurm and not browser",
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_tests_of_a_slurm_run_on_request_alone() -> None:
    def commands(target: str) -> str:
        done = subprocess.run(
            ["make", "-n", target, "PYTHON=python"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout

    everything = commands("test-all")
    assert everything.count(" -m pytest ") == everything.count("not slurm") == 2
    slurm = commands("test-slurm")
    assert "cluster.sh up && " in slurm and "trap 'tests/slurm/cluster.sh down' EXIT" in slurm
    assert "-m pytest -m slurm" in slurm


def refusal(**variables: str) -> subprocess.CompletedProcess[str]:
    """What the Slurm of the tests says instead of coming up."""
    command = ["tests/slurm/cluster.sh", "up"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def test_the_slurm_of_the_tests_leaves_a_real_one_alone(tmp_path: Path) -> None:
    real, state = tmp_path / "slurm.conf", tmp_path / "state"
    real.touch()
    fake = tmp_path / "id"  # a user that is not root
    fake.write_text("#!/bin/sh\necho 1000\n")
    fake.chmod(0o755)
    refused = refusal(MMTRAIN_SLURM_STATE=str(state), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "needs root" in refused.stderr
    fake.write_text("#!/bin/sh\necho 0\n")
    refused = refusal(MMTRAIN_SLURM_STATE=str(state), MMTRAIN_SYSTEM_SLURM_CONF=str(real),
                      PATH=f"{tmp_path}:{os.environ['PATH']}")  # fmt: skip
    assert refused.returncode == 2 and refused.stderr.startswith(f"error: {real} is there")
    assert not state.exists()
