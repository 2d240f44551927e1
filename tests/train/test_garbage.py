"""Garbage is collected when the run says, and the process is left as it was."""

from __future__ import annotations

import gc
import weakref

import pytest

from mmtrain.train.garbage import INTERVAL, collect, collected_in_step


class _Circle:
    def __init__(self) -> None:
        self.me = self


def test_circles_go_at_the_interval_and_not_before() -> None:
    with collected_in_step():
        gone = weakref.ref(_Circle())
        for step in range(1, INTERVAL):
            collect(step)
        assert not gc.isenabled() and gone() is not None
        collect(INTERVAL)
        assert gone() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_an_error_leaves_collection_as_it_was() -> None:
    with pytest.raises(ValueError), collected_in_step():
        raise ValueError
    assert gc.isenabled()
    gc.disable()
    try:
        with collected_in_step():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
