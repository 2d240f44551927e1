"""A run with a rank that is slower than the other: it is named, once, and the run goes on to its end."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.dist.runs import SMALL, environment
from tests.dist.warm import run_script


@pytest.mark.parametrize(
    ("slow", "said"),
    [("1:device", "rank 1 ({host}) is slow, and all wait for it: a product takes its device"),
     ("0:rows", "rank 0 ({host}) is slow, and all wait for it: it waits 0.5")],
)  # fmt: skip
def test_a_slow_rank_is_named(tmp_path: Path, corpus: Path, slow: str, said: str) -> None:
    given = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=r", "run.max_steps=6",
             "guard.pace_interval=2", "data.num_workers=0"]  # fmt: skip
    done = run_script("tests/dist/slow_launcher.py", given, environment() | {"SLOW": slow}, 2, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "r/log.txt").read_text()
    lines = [line for line in log.splitlines() if "is slow" in line]
    assert [line for line in lines if said.format(host=socket.gethostname()) in line]
    assert len([line for line in lines if f"rank {slow[0]} " in line]) == 1
