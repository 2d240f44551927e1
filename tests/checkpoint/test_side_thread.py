"""Calls in a thread beside: in order, one at a time, and none of their errors is lost."""

from __future__ import annotations

import threading
import time

import pytest

from mmtrain.checkpoint.side_thread import SideThread


def fail() -> None:
    raise OSError(28, "No space left on device")


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_calls_are_made_in_order_and_one_at_a_time() -> None:
    done: list[int] = []
    with SideThread("beside") as beside:
        for i in range(50):
            beside.start(lambda i=i: done.append(i))
        beside.wait()
        assert done == list(range(50)) and not beside.is_busy
    assert "beside" not in names()


def test_it_is_busy_until_its_call_has_ended_and_the_block_waits_for_it() -> None:
    begin, ended = threading.Event(), []
    with SideThread("beside") as beside:
        beside.start(lambda: (begin.wait(), time.sleep(0.05), ended.append(True)))
        assert beside.is_busy
        begin.set()
    assert ended and "beside" not in names()


@pytest.mark.parametrize("where", ["wait", "start", "end"])
def test_an_error_is_raised_where_the_call_is_waited_for_and_once(where: str) -> None:
    called = []
    with pytest.raises(OSError, match="No space left"), SideThread("beside") as beside:
        beside.start(fail)
        if where == "wait":
            beside.wait()
        if where == "start":
            beside.start(lambda: called.append(True))
    assert not called and "beside" not in names()
    beside.wait()  # was told


def test_an_error_of_the_block_itself_goes_first() -> None:
    with pytest.raises(KeyError), SideThread("beside") as beside:
        beside.start(fail)
        raise KeyError
    assert "beside" not in names()
