"""Lock of a run folder: one holder, refusal in a line, and owners that are gone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmtrain.checkpoint import lock_owner
from mmtrain.checkpoint.lock import LockLost, RunLock
from mmtrain.checkpoint.lock_owner import Owner
from mmtrain.errors import ConfigError
from tests.checkpoint.fake import said


def lock(folder: Path, note: Callable[[str], None] = pytest.fail, **options: float) -> RunLock:
    return RunLock(folder, note, **options)


def leave(folder: Path, **changed: object) -> Owner:
    """A lock as another owner left it."""
    owner = dataclasses.replace(Owner.this_process(), **changed)
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(json.dumps(dataclasses.asdict(owner)))
    return owner


def test_a_second_launch_is_refused_in_a_line(tmp_path: Path) -> None:
    with lock(tmp_path / "r") as held:
        with pytest.raises(ConfigError) as refused, lock(tmp_path / "r"):
            pass
        line = str(refused.value)
        assert line.startswith(f"run.name=r: another launch of this run is at work (pid {os.getpid()} on ")
        assert held.owner.since in line and "or give another run.name" in line and "\n" not in line
        assert [path.name for path in (tmp_path / "r").iterdir()] == [".lock"]
        held.check()
    assert not (tmp_path / "r").exists()  # nothing was written
    with lock(tmp_path / "r"):
        (tmp_path / "r/config.json").touch()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["config.json"]


def test_an_error_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock(tmp_path / "r"):
        raise RuntimeError
    with lock(tmp_path / "r"):
        pass


@pytest.mark.slow
def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    leave(tmp_path / "r", pid=2**22 + 1)  # above the largest there is: gone
    barrier, done = threading.Barrier(8), threading.Barrier(8)

    def race(_: int) -> bool:
        barrier.wait()
        try:
            with lock(tmp_path / "r", note=lambda line: None):
                done.wait()
                return True
        except ConfigError:
            done.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(race, range(8))) == 1


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    holder = (
        "import sys, pathlib, time\nfrom mmtrain.checkpoint.lock import RunLock\n"
        "with RunLock(pathlib.Path(sys.argv[1]), print):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"pid {process.pid} on "), lock(tmp_path / "r"):
        pass
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie still
    lines: list[str] = []
    with lock(tmp_path / "r", lines.append) as held:
        assert f"a launch that is gone (pid {process.pid} on " in said(lines)
        held.check()
    process.wait()


def test_a_process_id_that_was_given_again_is_not_the_owner(tmp_path: Path) -> None:
    leave(tmp_path / "r", started="1")  # this process's id, at another time
    lines: list[str] = []
    with lock(tmp_path / "r", lines.append):
        assert "gone" in said(lines)


def test_a_kill_while_a_lock_was_taken_over_holds_nobody_up(tmp_path: Path) -> None:
    leave(tmp_path / "r", started="1")
    (tmp_path / "r/.lock.guard").mkdir()
    os.utime(tmp_path / "r/.lock.guard", (0, time.time() - 100))
    with lock(tmp_path / "r", lambda line: None):
        assert [path.name for path in (tmp_path / "r").iterdir()] == [".lock"]


@pytest.mark.parametrize("garbage", [False, True])
def test_another_host_s_lock_is_stale_once_nobody_touches_it(tmp_path: Path, garbage: bool) -> None:
    leave(tmp_path / "r", host="elsewhere", machine="another")
    if garbage:
        (tmp_path / "r/.lock").write_text("")
    os.utime(tmp_path / "r/.lock", (0, time.time() - 100))
    lines: list[str] = []
    with lock(tmp_path / "r", lines.append, stale=90):
        assert "gone" in said(lines)
    leave(tmp_path / "r", host="elsewhere", machine="another")
    with pytest.raises(ConfigError, match="on elsewhere"), lock(tmp_path / "r", lines.append, stale=90, patience=0):
        pass


def test_the_file_system_s_clock_counts_not_this_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path / "r", host="elsewhere", machine="another")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 1e6)
    with pytest.raises(ConfigError), lock(tmp_path / "r", lambda line: None, stale=90, patience=0):
        pass


def test_a_lock_is_watched_until_it_is_touched_or_stale(tmp_path: Path) -> None:
    leave(tmp_path / "r", host="elsewhere", machine="another")
    lines: list[str] = []
    with lock(tmp_path / "r", lines.append, beat=0.1, stale=0.5):
        assert "watching" in lines[0] and "gone" in lines[1] and len(lines) == 2
    leave(tmp_path / "r", host="elsewhere", machine="another")
    released = threading.Event()

    def touch() -> None:
        while not released.wait(0.05):
            os.utime(tmp_path / "r/.lock")

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ConfigError), lock(tmp_path / "r", lines.append, beat=0.1, stale=30):
            pass
    finally:
        released.set()
        thread.join()


def test_an_owner_shows_that_it_lives_and_notices_its_loss(tmp_path: Path) -> None:
    path = tmp_path / "r/.lock"
    with lock(tmp_path / "r", beat=0.02) as held:
        os.utime(path, (0, 0))
        wait_for(lambda: path.stat().st_mtime > 0)
        path.unlink()  # by hand: it comes back
        wait_for(path.exists)
        held.check()
        other = leave(tmp_path / "r", host="elsewhere", machine="another")
        wait_for(held._lost.is_set)
        with pytest.raises(LockLost, match=f"taken over by another launch \\(pid {other.pid} on elsewhere"):
            held.check()
    assert path.exists()  # it is the other's


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_without_hard_links_the_lock_is_made_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("mmtrain.checkpoint.lock.os.link", refuse)
    with lock(tmp_path / "r"), pytest.raises(ConfigError, match="at work"), lock(tmp_path / "r"):
        pass
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"run\.dir=.*runs: cannot be written: Not a directory"), \
            lock(tmp_path / "runs/r"):  # fmt: skip
        pass


STAT = "1234 (py thon) {state} 1 1 1 0 -1 {flags} " + " ".join(str(n) for n in range(10, 22)) + " 777 0 0\n"
STATUS = "Name:\tpython\nSigPnd:\t{own}\nShdPnd:\t{shared}\n"
NONE, KILL, TERM = "0000000000000000", "0000000000000100", "0000000000004000"


@pytest.mark.parametrize(
    ("state", "flags", "own", "shared", "gone"),
    [
        ("S", 0x400040, NONE, NONE, False),
        ("S", 0x400040, TERM, TERM, False),
        ("Z", 0x400040, NONE, NONE, True),
        ("D", 0x400044, NONE, NONE, True),  # on its way out
        ("R", 0x400040, KILL, NONE, True),
        ("D", 0x400040, NONE, KILL, True),
    ],
)
def test_a_process_that_was_killed_holds_no_lock_though_it_has_not_gone_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, flags: int, own: str, shared: str, gone: bool
) -> None:
    folder = tmp_path / "1234"
    folder.mkdir()
    (folder / "stat").write_text(STAT.format(state=state, flags=flags))
    (folder / "status").write_text(STATUS.format(own=own, shared=shared))
    monkeypatch.setattr(lock_owner, "PROC", tmp_path)
    owner = dataclasses.replace(Owner.this_process(), pid=1234, started=lock_owner._process(1234)[1])
    assert owner.is_gone() is gone
