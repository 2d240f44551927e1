"""A run whose phases have layouts of their own: what happens at a boundary, and after a kill around one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmtrain.optim.host_kernel import load_host_adam
from tests.dist.runs import ROOT, SMALL, environment, kill_launch, pretrain, records, steps
from tests.dist.warm import run_script

PHASE = "{name: %s, seq_len: %d, rope_base: %g, tokens: 2048, batch: [{at: 0, tokens: 512}], " \
        "lr: [{kind: constant, tokens: 2048, end: 0.01}], parallel: %s}"  # fmt: skip
LAYOUTS = (
    "{cp: 1}",
    "{cp: 2, cp_chunks: 4, activation_checkpoint: selective, offload_block_inputs: true}",
    "{tp: 2, activation_checkpoint: true, offload_block_inputs: true}",
    "{cp: 1}",
)
STAGE = ",".join(
    PHASE % (name, length, base, parallel)
    for name, length, base, parallel in zip("abcd", (64, 128, 256, 64), (1e4, 1e5, 1e6, 1e4), LAYOUTS, strict=True)
)
OPTIONS = [*(one for one in SMALL if not one.startswith("stage.")), f"stage.phases=[{STAGE}]", "checkpoint.keep=0",
           "checkpoint.interval=3", "run.name=run"]  # fmt: skip
TIMES = ("time", "tokens_per_s", "mfu", "step_s", "layout_s", "memory_gib", "exchange_s", "exchange_hidden")


class Whole(NamedTuple):
    """A run through all phases, what it printed, and its options but for the folders."""

    run: Path
    printed: str
    options: list[str]


def told(run: Path) -> list[dict[str, Any]]:
    """All records but their times."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records(run)]


@pytest.fixture(scope="module", params=["adamw", pytest.param("cpu_offload", marks=pytest.mark.slow)])
def whole(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    if request.param == "cpu_offload":
        pytest.importorskip("deepspeed", reason="the extra `offload` is not installed")
        load_host_adam()  # compiles the kernel, if it has to, without a limit of time
    folder, options = tmp_path_factory.mktemp("whole"), [*OPTIONS, f"optim={request.param}"]
    done = pretrain(*options, f"data.path={corpus}", f"run.dir={folder}", processes=2)
    return Whole(folder / "run", done.stdout + done.stderr, options)


def test_a_boundary_is_one_line_and_one_record(whole: Whole) -> None:
    run, printed, _ = whole
    found = steps(run)
    assert [record["phase"] for record in found] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["d"] * 4
    assert [record["first_row"] for record in found[:6]] == [0, 8, 16, 24, 0, 4]
    events = [record for record in records(run) if "layout" in record]
    assert [event["step"] for event in events] == [5, 9, 13]
    assert "CP2" in events[0]["layout"] and "CP1 x TP2" in events[1]["layout"] and "DP2" in events[2]["layout"]
    changed = "cp 1 -> 2, cp_chunks 8 -> 4"
    recomputed = "activation_checkpoint none -> selective, offload_block_inputs false -> true"
    assert events[0]["layout_changed"] == f"{recomputed}, {changed}"
    assert printed.count(f"layout from step 5 on: {recomputed}, cp 1 -> 2") == 1
    assert ("cp_balance" in found[4], "cp_balance" in found[0], "cp_balance" in found[8]) == (True, False, False)
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert {"step-00000004", "step-00000008", "step-00000012", "step-00000016"} <= set(names)


def test_what_follows_a_boundary_is_a_fresh_start_under_that_layout(whole: Whole, corpus: Path, tmp_path: Path) -> None:
    """From the same checkpoint, in new processes: to the bit."""
    run, _, options = whole
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        if int(checkpoint.name[5:]) > 8:
            shutil.rmtree(checkpoint)
    pretrain(*options, f"data.path={corpus}", f"run.dir={tmp_path}", "run.resume=auto", processes=2)
    mine = [record for record in told(tmp_path / "run") if "layout" not in record or record["step"] != 9]
    theirs = [record for record in told(run) if "layout" not in record or record["step"] != 9]
    assert mine == theirs  # that launch began in the layout of the third phase: it met no boundary there


@pytest.mark.parametrize("reshard", [True, False])
def test_nothing_of_a_layout_outlives_it(corpus: Path, tmp_path: Path, reshard: bool) -> None:
    """The model that was there at the beginning too, which Python's collector was told to pass by."""
    given = [*OPTIONS, f"data.path={corpus}", f"run.dir={tmp_path}", f"parallel.reshard_after_forward={reshard}"]
    done = run_script("tests/dist/kept_launcher.py", given, environment(), 2, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("closed: ") == done.stdout.count("closed: 0 models are left") == 2 * 4


@pytest.mark.slow
def test_no_layout_changes_what_is_learned(whole: Whole, corpus: Path, tmp_path: Path) -> None:
    """One process and torch's AdamW learn the same."""
    plain = [*OPTIONS]
    for i in range(4):
        plain.append(f"stage.phases.{i}.parallel=null")
    pretrain(*plain, f"data.path={corpus}", f"run.dir={tmp_path}", processes=1)
    for mine, theirs in zip(steps(whole.run), steps(tmp_path / "run"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-4), mine["step"]


@pytest.mark.slow
@pytest.mark.parametrize("after", ["saved step-4", "step 3", "layout from step 9"])
def test_a_kill_around_a_boundary_changes_nothing(whole: Whole, corpus: Path, tmp_path: Path, after: str) -> None:
    """Killed inside of the boundary, before and behind it, and started again."""
    options = [*whole.options, f"data.path={corpus}", f"run.dir={tmp_path}", "run.resume=auto"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "launch/pretrain.py", *options]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:  # fmt: skip
        try:
            wait_for(tmp_path / "run", after, process)
        finally:
            kill_launch(process)  # with its ranks, which would otherwise go on beside the launch below
    pretrain(*options, processes=2)
    # A launch that begins behind a boundary has no record of it.
    mine, theirs = ([one for one in told(run) if "layout" not in one] for run in (tmp_path / "run", whole.run))
    assert [record["step"] for record in mine] == [record["step"] for record in theirs]
    apart = [
        (one["step"], key, one.get(key), other.get(key))
        for one, other in zip(mine, theirs, strict=True)
        for key in one.keys() | other.keys()
        if one.get(key) != other.get(key)
    ]
    assert not apart  # which step and which figure, if one is not the same to the bit


def wait_for(run: Path, what: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    kind, number = what.rsplit("-" if what.startswith("saved") else " ", 1)
    while time.monotonic() < end and process.poll() is None:
        if kind == "saved step":
            if (run / f"checkpoints/step-{int(number):08d}").is_dir():
                return
        elif (run / "metrics.jsonl").exists():
            key = "layout" if kind.startswith("layout") else "loss"
            lines = [
                json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")
            ]
            if any(key in record and record["step"] >= int(number) for record in lines):
                return
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come")
