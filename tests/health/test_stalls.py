"""Steps that do not end: when a rank says so, what rank 0 tells, and where a main thread stands."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mmtrain.health.heartbeat import LEFT, Beat
from mmtrain.health.stacks import dump, main_place
from mmtrain.health.stalls import Stall


class Beating:
    """A heartbeat without threads and store, of rank `rank` of three."""

    def __init__(self, rank: int) -> None:
        self.rank, self.world, self.interval, self.now, self.step = rank, 3, 2.0, 0.0, None
        self.own, self.heard, self.stalled_at = Beat(), dict.fromkeys(range(3), Beat()), ""
        self.hosts = [(f"host{rank}", 10 + rank) for rank in range(3)]

    def say_stalled(self, place: str) -> None:
        self.stalled_at = place


def looks(stall: Stall, beating: Any, *seconds: float) -> list[bool]:
    """Whether the rank says that it has stalled, each so many seconds later."""
    found = []
    for more in seconds:
        beating.now += more
        stall.look()
        found.append(bool(beating.stalled_at))
    return found


def test_a_step_stalls_after_its_time_and_until_the_next(tmp_path: Path) -> None:
    beating = Beating(1)
    stall = Stall(beating, 10.0, tmp_path)
    assert looks(stall, beating, 0, 1000) == [False, False]  # before the first step
    stall.dump()
    assert not list(tmp_path.iterdir())  # nothing is written into a folder that may be another launch's
    beating.step = 1
    assert looks(stall, beating, 0, 9, 2, 50) == [False, False, True, True]
    assert "looks" in (tmp_path / "rank-00001.txt").read_text()
    assert stall.verdict() is not None
    beating.step = 2
    assert looks(stall, beating, 1, 9, 2) == [False, False, True]
    beating.heard = dict.fromkeys(range(3), Beat(stalled_at=beating.stalled_at))
    assert stall.verdict() is None  # all at one place: the error itself says more
    beating.step, beating.own = 3, Beat(state=LEFT)
    assert looks(stall, beating, 1, 1000) == [False, False]
    assert stall.verdict() is None


def test_rank_0_tells_once_a_step_who_stands_apart(capsys: pytest.CaptureFixture[str]) -> None:
    beating = Beating(0)
    stall = Stall(beating, 10.0, None)
    beating.step = 7
    looks(stall, beating, 0, 11)
    beating.heard[1] = Beat(stalled_at=beating.stalled_at)
    beating.heard[2] = Beat(stalled_at="data/loader.py:3 read")
    assert capsys.readouterr().err == ""  # the others may not have said it yet
    looks(stall, beating, 6, 1, 100)
    told = capsys.readouterr().err
    apart = "rank 2 of 3 (pid 12 on host2) at data/loader.py:3 read; ranks 0, 1 at"
    assert told.startswith(f"warning: no step for 17 s (step 7): {apart} ") and told.count("warning") == 1
    assert apart in str(stall.verdict())
    beating.step, beating.heard[1] = 8, Beat()
    looks(stall, beating, 0, 17)
    assert "rank 1 of 3 (pid 11 on host1) at another step" in capsys.readouterr().err


def test_a_place_is_of_the_main_thread_and_no_library_s() -> None:
    found: list[str] = []
    asking = threading.Thread(target=lambda: (time.sleep(0.2), found.append(main_place())))
    asking.start()
    asking.join()
    (place,) = found
    assert place.startswith("health/test_stalls.py:") and "test_a_place_is_of" in place and ", in " in place


def test_stacks_that_cannot_be_written_hinder_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dump(tmp_path / "file/stacks/rank-0.txt")
