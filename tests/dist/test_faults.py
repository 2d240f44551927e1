"""Faults of one rank: a weight that is no number, and a file system that stalls, for a while or for good."""

from __future__ import annotations

import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from mmtrain.checkpoint.contents import integrity
from mmtrain.checkpoint.listing import all_checkpoints
from mmtrain.errors import RankLost
from mmtrain.log.metrics import read_metrics
from tests.dist.runs import SMALL, environment
from tests.dist.warm import run_script


def run(corpus: Path, folder: Path, fault: dict[str, str], *options: str) -> CompletedProcess[str]:
    given = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "run.name=r", "data.num_workers=0",
             "run.max_steps=8", "checkpoint.interval=2", *options]  # fmt: skip
    return run_script("tests/dist/fault_launcher.py", given, {**environment(), **fault}, 2, timeout=300)


@pytest.mark.parametrize("step", [3, 4])  # a step before a save, and just before one
def test_a_weight_of_one_rank_that_is_no_number_is_never_saved(corpus: Path, tmp_path: Path, step: int) -> None:
    done = run(corpus, tmp_path, {"NAN": f"{step}:1"})
    assert done.returncode == 4, done.stderr[-3000:]
    assert "stopped after step 4: the weights hold numbers that are not finite; nothing was saved of it" in done.stderr
    assert [path.name for path in all_checkpoints(tmp_path / "r/checkpoints")] == ["step-00000002"]


def test_a_weight_that_no_row_reads_is_found_at_the_end(corpus: Path, tmp_path: Path) -> None:
    """It is in the embedding's row of a token that the text has not got: neither loss nor gradient tell of it."""
    done = run(corpus, tmp_path, {"NAN": "3:1"}, "checkpoint.interval=100")
    assert done.returncode == 4 and "stopped after step 8: the weights hold numbers that are not" in done.stderr
    assert not all_checkpoints(tmp_path / "r/checkpoints")


def test_a_file_system_that_stalls_for_a_while_costs_no_step(corpus: Path, tmp_path: Path) -> None:
    done = run(corpus, tmp_path, {"STALL": "2:1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [record["step"] for record in read_metrics(tmp_path / "r") if "loss" in record] == list(range(1, 9))
    newest = max(all_checkpoints(tmp_path / "r/checkpoints"))
    assert newest.name == "step-00000008" and integrity(newest, False)[0] == "whole"


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_file_system_that_stalls_for_good_ends_the_run_and_says_where(
    corpus: Path, tmp_path: Path, asynchronous: str
) -> None:
    options = ["cluster.timeout_minutes=0.25", f"checkpoint.asynchronous={asynchronous}"]
    done = run(corpus, tmp_path, {"STALL": "600:1"}, *options)
    assert done.returncode == RankLost.EXIT_CODE, done.stderr[-3000:]
    where = "checkpoint/save.py" if asynchronous == "true" else "fault_launcher.py"
    said = rf"step \d+ did not end: rank 0 .* at checkpoint/save.py.*; rank 1 of 2 .* at \S*{where}:\d+ .*stacks of all"
    assert re.search(said, done.stderr)
    assert [path.name for path in all_checkpoints(tmp_path / "r/checkpoints")] == ["step-00000002"]
