"""Commands of the pages that a CPU can run, as they are printed, from a folder like a clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.runs import ROOT, environment
from tests.test_readme import commands

SHORT = "run.max_steps=2"  # the pages' own runs take minutes


def run(line: str, clone: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as an activated environment has it
    done = subprocess.run(["bash", "-c", line], cwd=clone, env={**environment(), "PATH": path}, capture_output=True,
                          text=True, timeout=500, check=False)  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def line_of(program: str, *parts: str) -> str:
    (line,) = {line for line in commands(program) if all(part in line for part in parts)}
    return line


@pytest.mark.slow
def test_first_run_own_text_and_long_context(tmp_path: Path) -> None:
    for name in ("launch", "configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for path in sorted((ROOT / "mmtrain").rglob("*.py"))[:60]:
        shutil.copy(path, texts / f"{path.parent.name}_{path.name}")
    for i in range(20):  # some for the bucket of short documents
        (texts / f"short_{i}.py").write_text(f"def add_{i}(x: int) -> int:\n    return x + {i}\n" * 3)
    run(line_of("launch/prepare.py ", "--input my_texts/"), tmp_path)
    shutil.copytree(tmp_path / "corpora/mine", tmp_path / "corpora/stdlib")  # the recipe itself is in `make pretrain`
    run(f"{line_of('launch/pretrain.py ', 'run.name=by_hand')} {SHORT}", tmp_path)
    run(line_of("launch/generate.py ", "runs/by_hand"), tmp_path)
    run(f"{line_of('launch/pretrain.py ', 'run.name=mine', 'stage=quickstart')} {SHORT}", tmp_path)
    run(f"{line_of('launch/profile_step.py ', 'model=tiny')} --steps 1 --warmup 1", tmp_path)
    assert (tmp_path / "profiles/first/report.txt").is_file()
    (tmp_path / "runs/by_hand").rename(tmp_path / "runs/quickstart")
    long = line_of("launch/pretrain.py ", "stage=long_ctx", "model=tiny")
    run(f"{long} {SHORT}", tmp_path)
    lengths = [
        json.loads(line)["seq_len"] for line in (tmp_path / "runs/long/metrics.jsonl").read_text().splitlines()[:2]
    ]
    assert min(lengths) > 512  # longer than the rows that it was trained on
