"""Sweeps that are started, stopped, gone on with, retried, refused: with a launcher that trains nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtrain.checkpoint.lock import RunLock
from mmtrain.errors import ConfigError
from mmtrain.scaling.points import read_points
from tests.dist.runs import environment
from tests.runs.sweep.stand_in import ROOT, StandIn

A, B, C = "hybrid-a-8.192K", "hybrid-b-8.192K", "hybrid-c-8.192K"


def test_runs_end_and_stay(stand_in: StandIn, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stand_in.run(f"data.path={corpus}") == 0
    assert stand_in.started == [A, B, C]
    points = read_points(stand_in.folder)
    assert [(point.run, point.tokens, point.final) for point in points if point.run == A] == [
        (A, 4096, False), (A, 6144, False), (A, 8192, True),
    ]  # fmt: skip
    assert points[2].loss == 2 + 1 / 8 + 10 / 8 and points[2].group is None and points[2].experts == 0
    told = capsys.readouterr().out
    assert "3 of 3 runs done, 9 points" in told and f"done    {A}: loss 3.3750" in told
    assert stand_in.run(f"data.path={corpus}") == 0
    assert stand_in.started == [A, B, C]
    assert "0 to start" in capsys.readouterr().out


def test_nothing_is_started_or_written_by_a_plan(stand_in: StandIn, corpus: Path) -> None:
    assert stand_in.run(f"data.path={corpus}", plan=True) == 0
    assert stand_in.started == [] and not stand_in.folder.exists()


def test_a_failure_is_told_and_retried_when_asked(
    stand_in: StandIn, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = stand_in.order("fail", B)
    assert stand_in.run(f"data.path={corpus}") == 1
    told = capsys.readouterr().out
    assert f"failed  {B}: error: model.x=1: planned ({stand_in.folder}/logs/{B}.txt)" in told
    assert "2 of 3 runs done" in told and "--retry" in told
    order.unlink()
    assert stand_in.run(f"data.path={corpus}") == 1 and stand_in.started == [A, B, C]
    assert stand_in.run(f"data.path={corpus}", retry=True) == 0 and stand_in.started == [A, B, B, C]


def test_a_loss_that_is_no_number_is_a_failure(
    stand_in: StandIn, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.order("diverge", C)
    assert stand_in.run(f"data.path={corpus}") == 1
    assert f"failed  {C}: its held-out loss is not finite" in capsys.readouterr().out
    assert {point.run for point in read_points(stand_in.folder)} == {A, B}


def test_another_sweep_of_the_name_is_refused(stand_in: StandIn, corpus: Path) -> None:
    assert stand_in.run(f"data.path={corpus}") == 0
    with pytest.raises(ConfigError, match=r"sweep.name=tiny: .* holds another sweep: sweep.lr was \[0.002\] and is"):
        stand_in.run(f"data.path={corpus}", "sweep.lr=[0.001]")
    with pytest.raises(ConfigError, match=r"optim.beta2 was \(absent\) and is 0.9"):
        stand_in.run(f"data.path={corpus}", "optim.beta2=0.9")
    with pytest.raises(
        ConfigError, match=r"sweep: sweep\.sizes\.b\.ffn was 16 and is 32, sweep\.sizes\.c was .* is \(absent\)"
    ):
        stand_in.run(f"data.path={corpus}", "sweep.sizes=[{name: a, layers: 8, hidden: 16, ffn: 16}, "
                     "{name: b, layers: 16, hidden: 16, ffn: 32}]")  # fmt: skip
    assert stand_in.run(f"data.path={corpus}", "sweep.runs_at_once=1", "sweep.flops_per_second=1e9") == 0


def test_two_sweeps_of_one_folder_are_refused(stand_in: StandIn, corpus: Path) -> None:
    with (
        RunLock(stand_in.folder, print),
        pytest.raises(ConfigError, match=r"sweep.name=tiny: another launch of this"),
    ):
        stand_in.run(f"data.path={corpus}")
    assert stand_in.started == []


def test_too_little_text_is_refused_before_anything_starts(stand_in: StandIn, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path=.*is read .* times over.*\(run hybrid-a-65.54K\)"):
        stand_in.run(f"data.path={corpus}", "sweep.tokens=[64Ki]")
    with pytest.raises(ConfigError, match=r"data.path=\(missing\): no corpus given"):
        stand_in.run("data.path=null")
    assert stand_in.started == [] and not stand_in.folder.exists()


def test_too_little_memory_is_refused_before_anything_starts(stand_in: StandIn, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=rf"GiB of device memory.*\(run {A}\)"):
        stand_in.run(f"data.path={corpus}", "cluster.device_memory_gib=0.0001")
    assert stand_in.started == []


def test_a_slot_takes_one_run_at_a_time(stand_in: StandIn, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stand_in.run(f"data.path={corpus}", "sweep.runs_at_once=1") == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("start", "done"))]
    assert lines == ["start", "done"] * 3
    given = json.loads((stand_in.place / f"environment-{A}").read_text())
    assert given["OMP_NUM_THREADS"] == "1" and given["run.resume"] == "auto"


def _started(stand_in: StandIn, corpus: Path) -> subprocess.Popen[str]:
    """Start the sweep in a process of its own and wait until its first two runs wait."""
    for run in (A, B, C):
        stand_in.order("wait", run)
    code = (  # where the tests were started in the background, Ctrl-C is ignored
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from tests.runs.sweep.stand_in import StandIn; "
        "from mmtrain.command_line import exit_code; "
        "sys.exit(exit_code(lambda: StandIn(Path(sys.argv[1])).run(*sys.argv[2:])))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(stand_in.place), f"data.path={corpus}"],
                               cwd=ROOT, env=environment(), text=True)  # fmt: skip
    runs, deadline = stand_in.folder / "runs", time.monotonic() + 120
    while len(list(runs.glob("*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_was_stopped_goes_on(
    stand_in: StandIn, corpus: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    process = _started(stand_in, corpus)
    try:
        process.send_signal(number)
        code = process.wait(60)
    finally:
        process.kill()
    assert code == (-number if number == signal.SIGKILL else 130)
    for path in stand_in.place.glob("wait-*"):
        path.unlink()
    assert len(stand_in.started) == 2 and _all_gone(stand_in)
    assert stand_in.run(f"data.path={corpus}") == 0
    assert "stopped at step 1" in capsys.readouterr().out and len(stand_in.started) == 5


def _all_gone(stand_in: StandIn) -> bool:
    """Wait until no run of the sweep is at work; on Linux those of a sweep that was killed stop too."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = [Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
        if not any(str(stand_in.launcher) in path.read_text() for path in lines if path.exists()):
            return True
        time.sleep(0.05)
    return False


def test_a_lost_lock_stops_the_sweep(stand_in: StandIn, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: RunLock) -> None:
        raise ConfigError("sweep.name", "tiny", "was taken over", "wait")

    monkeypatch.setattr(RunLock, "check", lost)
    stand_in.order("wait", A)
    with pytest.raises(ConfigError, match="was taken over"):
        stand_in.run(f"data.path={corpus}", "sweep.runs_at_once=3")
    assert _all_gone(stand_in)
