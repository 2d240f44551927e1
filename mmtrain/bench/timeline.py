"""Picture of what a GPU did in a call: torch's profiler, drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmtrain.log.kernel_times import profile
from mmtrain.log.timeline import draw_timeline


def record(run: Callable[[], object], path: Path | None, title: str) -> None:
    """Profile two calls and draw the second to `path`; with None, only take part in them.

    Both launch the same kernels; when the second begins, the ranks are at work already.
    """
    runs = profile(lambda: (run(), run())).runs
    if path is not None:
        draw_timeline(runs[len(runs) // 2 :], path, title)
