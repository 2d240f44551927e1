"""What a GPU did, stream by stream, as a picture: torch's profiler, drawn."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KINDS = {
    **dict.fromkeys(("nccl", "meet_kernel", "take_kernel"), ("communication", "tab:red")),
    **dict.fromkeys(("cutlass", "gemm"), ("products", "tab:blue")),
}
OTHER = ("the rest", "tab:gray")


def record(run: Callable[[], object], path: Path | None, title: str) -> None:
    """Profile two calls and draw the second to `path`; with None, only take part in them.

    Both launch the same kernels; when the second begins, the ranks are at work already.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        torch.cuda.synchronize()
        run()
        run()
        torch.cuda.synchronize()
    if path is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels.sort(key=lambda event: event["ts"])
    draw(kernels[len(kernels) // 2 :], path, title)


def draw(events: list[dict[str, Any]], path: Path, title: str) -> None:
    """A row for each stream, a bar for each kernel; times from the first one on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    begin = min(event["ts"] for event in events)
    streams = sorted({event["args"]["stream"] for event in events})
    figure, axes = plt.subplots(figsize=(16, 1.2 + 0.7 * len(streams)))
    for event in events:
        _, colour = kind(event["name"])
        span = ((event["ts"] - begin) / 1e3, event["dur"] / 1e3)
        axes.broken_barh([span], (streams.index(event["args"]["stream"]) - 0.4, 0.8), facecolors=colour)
    axes.set_yticks(range(len(streams)), [f"stream {number}" for number in streams])
    axes.set_xlabel("ms")
    axes.set_title(title)
    axes.legend(handles=[Patch(color=c, label=name) for name, c in dict([*KINDS.values(), OTHER]).items()], ncols=3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def kind(name: str) -> tuple[str, str]:
    """What a kernel does, by its name, and its colour."""
    return next((found for part, found in KINDS.items() if part in name.lower()), OTHER)
