"""Every shell script of the repository, and every rendered job, passes shellcheck."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(
    path
    for pattern in ("launch/slurm/**/*.sh", "launch/slurm/*.sbatch", "tests/**/*.sh", "tests/**/*.sbatch", ".ci/run")
    for path in ROOT.glob(pattern)
)
SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")


def check(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SHELLCHECK, "--external-sources", str(path)], capture_output=True, text=True, check=False)


@pytest.mark.skipif(SHELLCHECK is None, reason="the extra `test` is not installed")
def test_shell_scripts_are_clean(tmp_path: Path) -> None:
    names = {path.name for path in SCRIPTS}
    assert {"pretrain.sbatch", "node.sh", "rank.sh", "h800.sh", "cluster.sh", "array.sbatch", "run"} <= names
    wrong = [done.stdout for path in SCRIPTS if (done := check(path)).returncode]
    assert not wrong, "\n".join(wrong)
    planted = tmp_path / "planted.sh"
    planted.write_text("#!/bin/bash\nrm $1/*\n")
    assert check(planted).returncode


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_can_be_parsed(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent.name == "environment"], ids=lambda p: p.name)
def test_every_setting_of_a_cluster_has_a_reason(path: Path) -> None:
    blocks = path.read_text().split("\n\n")[1:]
    assert blocks and all(block.startswith("# ") and block.count("export ") == 1 for block in blocks)
