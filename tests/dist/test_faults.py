"""Faults of a rank: a weight that is no number, an error, a crash; and of the file system: full, read-only, stalled."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess, Popen

import pytest

from mmtrain.checkpoint.contents import integrity
from mmtrain.checkpoint.listing import all_checkpoints, step_of
from mmtrain.errors import RankLost
from mmtrain.log.metrics import read_metrics
from tests.dist.runs import ROOT, SMALL, environment
from tests.dist.warm import run_script


def run(corpus: Path, folder: Path, fault: dict[str, str], *options: str) -> CompletedProcess[str]:
    given = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "run.name=r", "data.num_workers=0",
             "run.max_steps=8", "checkpoint.interval=2", *options]  # fmt: skip
    return run_script("tests/dist/fault_launcher.py", given, {**environment(), **fault}, 2, timeout=300)


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.slow)])  # before a save, and just before one
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


def test_an_error_of_one_rank_is_told_with_its_place(corpus: Path, tmp_path: Path) -> None:
    done = run(corpus, tmp_path, {"RAISE": "5:1"})
    assert done.returncode == 1, done.stderr[-3000:]  # of the rank that failed; the others end with 3
    assert "AssertionError: not as it should be" in done.stderr and "in raise_error" in done.stderr
    assert all_checkpoints(tmp_path / "r/checkpoints")[0].name == "step-00000002"


def test_a_crash_of_one_rank_leaves_its_stacks(corpus: Path, tmp_path: Path) -> None:
    done = run(corpus, tmp_path, {"CRASH": "5:1"})
    assert done.returncode == -signal.SIGSEGV, done.stderr[-3000:]
    assert "Fatal Python error: Segmentation fault" in done.stderr and " in crash" in done.stderr
    assert all_checkpoints(tmp_path / "r/checkpoints")[0].name == "step-00000002"


@contextmanager
def mounted(*options: str, folder: Path) -> Iterator[Path]:
    """A file system of its own, where the machine lets us mount one."""
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", *options, folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def launched(corpus: Path, folder: Path, said: Path) -> Popen[str]:
    """A long run that saves often, and tells into a file that is on no disk of its own."""
    given = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "run.name=r", "stage.token_scale=1000",
             "checkpoint.interval=2", "checkpoint.keep=2"]  # fmt: skip
    command = [sys.executable, "launch/pretrain.py", *given]
    with said.open("w") as file:
        return Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, text=True)


def wait_for_line(said: Path, process: Popen[str], text: str) -> None:
    """Return when a new line has the text."""
    before, end = said.read_text().count(text), time.monotonic() + 120
    while said.read_text().count(text) == before:
        assert process.poll() is None and time.monotonic() < end, text
        time.sleep(0.05)


def check_it_goes_on(run: Path, said: Path, process: Popen[str]) -> None:
    """Saves work again; a signal ends the run, which has lost no step."""
    wait_for_line(said, process, "saved ")
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    done = [record["step"] for record in read_metrics(run) if "loss" in record]
    assert done == list(range(1, len(done) + 1))
    found = all_checkpoints(run / "checkpoints")
    assert step_of(found[-1]) == done[-1] and all(integrity(path, False)[0] == "whole" for path in found)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [path.name for path in found]


@pytest.mark.slow
def test_a_full_disk_keeps_the_run_and_its_checkpoints_until_there_is_room(corpus: Path, tmp_path: Path) -> None:
    with mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", folder=tmp_path / "small") as disk:
        run, said = disk / "r", tmp_path / "said.txt"
        process = launched(corpus, disk, said)
        try:
            for _ in range(2):
                wait_for_line(said, process, "saved ")
            with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(4096))
            wait_for_line(said, process, "could not be written: No space left on device (rank 0); the run goes on")
            kept = all_checkpoints(run / "checkpoints")
            assert kept and all(integrity(path, False)[0] == "whole" for path in kept)
            (disk / "filler").unlink()
            check_it_goes_on(run, said, process)
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_read_only_disk_keeps_the_run_until_it_can_be_written(corpus: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "r", tmp_path / "said.txt"
    process = launched(corpus, tmp_path, said)
    try:
        wait_for_line(said, process, "saved ")
        with contextlib.ExitStack() as stack:
            place = str(run / "checkpoints")
            if subprocess.run(["mount", "--bind", place, place], capture_output=True).returncode:
                pytest.skip("no file system can be mounted here")
            stack.callback(subprocess.run, ["umount", "-l", place], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
            wait_for_line(said, process, "could not be written: Read-only file system (rank 0); the run goes on")
        check_it_goes_on(run, said, process)
    finally:
        process.kill()
        process.wait()


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
