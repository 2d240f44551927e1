"""Python's garbage collection, at moments of our choosing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL = 50
"""Steps between collections. A step's own objects go without one, unless they refer to each other in a circle."""


@contextmanager
def collected_in_step() -> Iterator[None]:
    """Inside, nothing is collected but by :func:`collect`.

    Left alone, each process stops for it at a moment of its own, and at the next collective all others wait for it.
    What is there at the beginning is looked at again by :func:`collect_all` alone.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect(step: int) -> None:
    """Collect after this step if it is due, which it is on all processes at once."""
    if step % INTERVAL == 0:
        gc.collect()


def collect_all() -> None:
    """Collect what was there at the beginning too, such as the model of a layout that is left."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
