"""Runs that torchrun starts again after a rank or a node has died: they go on from the last good checkpoint."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.dist.runs import ROOT, SMALL, environment, kill_launch, pretrain, records, steps
from tests.dist.test_runs import exact
from tests.dist.warm import run_script

OPTIONS = [*SMALL, "run.name=r", "run.resume=auto", "checkpoint.interval=2", "checkpoint.keep=0"]
SECONDS = 240


def torchrun(options: list[str], *, more: list[str], **told: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *more, "tests/dist/kill_launcher.py", *options]
    return subprocess.Popen(command, cwd=ROOT, env={**environment(), **told}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.mark.slow
def test_a_rank_that_dies_costs_the_steps_since_the_last_checkpoint(corpus: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, f"data.path={corpus}"]
    pretrain(*options, f"run.dir={tmp_path / 'whole'}", processes=2)
    more = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    launched = torchrun([*options, f"run.dir={tmp_path}"], more=more, KILL="a step begins:6:1")
    out, _ = launched.communicate(timeout=SECONDS)
    assert launched.returncode == 0, out
    assert "resumed from" in out and "step-00000004 after step 4" in out
    assert exact(tmp_path / "r") == exact(tmp_path / "whole/r")


@pytest.mark.slow
def test_a_run_goes_on_with_the_nodes_that_are_left(corpus: Path, tmp_path: Path) -> None:
    """Of two nodes, of one rank each, the second is gone for good: the batch stays, on one rank."""
    options = [*OPTIONS, f"data.path={corpus}", f"run.dir={tmp_path}", "cluster.timeout_minutes=0.25", "parallel=auto"]
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a third node
    place = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"127.0.0.1:{meeting.port}",
             "--rdzv-conf", "is_host=0,last_call_timeout=10"]  # fmt: skip
    first = torchrun(options, more=place, KILL="a step begins:6:1", KILL_LAUNCHER="too")
    second = torchrun(options, more=place, KILL="a step begins:6:1", KILL_LAUNCHER="too")
    try:
        codes = [node.wait(SECONDS) for node in (first, second)]
        assert sorted(codes) == [-9, 0], [node.stdout.read()[-3000:] for node in (first, second)]
        out = (first if codes[0] == 0 else second).stdout.read()
    finally:
        for node in (first, second):
            kill_launch(node)
    assert "step-00000004 after step 4" in out and "dp 2 -> 1" in out
    pretrain(*OPTIONS, f"data.path={corpus}", f"run.dir={tmp_path / 'whole'}", processes=2)
    for mine, theirs in zip(steps(tmp_path / "r"), steps(tmp_path / "whole/r"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and mine["first_row"] == theirs["first_row"]
    assert records(tmp_path / "r")[-1]["val_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["a step begins:30:0", "all have written:3:1", "a manifest is not written:2:0"])
def test_ranks_that_a_dead_launcher_has_left_are_no_second_writers(corpus: Path, tmp_path: Path, kill: str) -> None:
    """They miss it and end; another launch is refused until then, and nothing is lost."""
    options = [*OPTIONS, "stage.token_scale=40", "checkpoint.interval=8", "checkpoint.keep=2", f"data.path={corpus}",
               "cluster.timeout_minutes=0.25"]  # fmt: skip
    pretrain(*options, f"run.dir={tmp_path / 'whole'}", processes=2)
    more = ["--standalone", "--nproc-per-node", "2"]
    launched = torchrun([*options, f"run.dir={tmp_path}"], more=more, KILL=kill, KILL_LAUNCHER="alone")
    assert launched.wait(SECONDS) == -9
    again = partial(run_script, "launch/pretrain.py", [*options, f"run.dir={tmp_path}"], environment(), 2, SECONDS)
    while (done := again()).returncode == 2:
        assert "another launch of this run is at work" in done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
    said = launched.communicate(timeout=SECONDS)[0]
    assert "torchrun of rank 0 of 2 " in said and "the store it keeps does not answer" in said
    mine, theirs = (folder / "r" for folder in (tmp_path, tmp_path / "whole"))
    assert [record["step"] for record in steps(mine)] == [record["step"] for record in steps(theirs)]
    assert exact(mine) == exact(theirs)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (mine, theirs)]
    assert names[0] == names[1]
