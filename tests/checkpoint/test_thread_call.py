"""One call in a thread: it is waited for, its error is raised there, and it can be given up."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from mmtrain.checkpoint.thread_call import ThreadCall


def test_waiting_ends_when_the_call_has() -> None:
    begin, done = threading.Event(), []
    call = ThreadCall("call", lambda call: (begin.wait(), done.append(threading.current_thread().name)))
    assert not done
    begin.set()
    call.wait()
    call.wait()
    assert done == ["call"] and "call" not in {thread.name for thread in threading.enumerate()}


def test_an_error_is_raised_where_it_is_waited_for() -> None:
    def fail(call: ThreadCall) -> None:
        raise OSError(12, "Cannot allocate memory")

    call = ThreadCall("call", fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        call.wait()
    ThreadCall("call", fail).give_up()


def test_one_that_is_given_up_is_told_and_waited_for() -> None:
    begun, ended = threading.Event(), []

    def run(call: ThreadCall) -> None:
        begun.set()
        while not call.is_stopped:
            pass
        ended.append(True)

    call = ThreadCall("call", run)
    begun.wait()
    assert not ended
    call.give_up()
    assert ended


def test_a_process_ends_without_waiting_for_one() -> None:
    code = (
        "import threading\nfrom mmtrain.checkpoint.thread_call import ThreadCall\n"
        "ThreadCall('call', lambda call: threading.Event().wait())\nraise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 7
