"""Picture of what a GPU did, stream by stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mmtrain.log.figure import new_figure, save_figure
from mmtrain.log.kernel_times import KINDS, OTHER, KernelTime, kind_of

_COLOURS = ("tab:red", "tab:orange", "tab:blue", "tab:brown", "tab:olive", "tab:green", "tab:cyan", "tab:purple",
            "tab:pink", "gold", "navy", "teal", "black")  # fmt: skip
COLOURS: dict[str, str] = {**dict(zip(KINDS, _COLOURS, strict=True)), OTHER: "tab:gray"}
"""Colour of each kind of kernel."""


def draw_timeline(runs: Sequence[KernelTime], path: Path, title: str) -> Path:
    """Draw a row for each stream and a bar for each kernel, and return the path.

    Args:
        runs: at least one kernel, by their beginning; times are counted from the first.
        path: of the PNG.
        title: above it.
    """
    from matplotlib.patches import Patch  # matplotlib is slow to import

    begin, streams = runs[0].begin, sorted({run.stream for run in runs})
    bars: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for run in runs:  # one call for all bars of a colour: a step has thousands
        bars[streams.index(run.stream), kind_of(run.name)].append(
            ((run.begin - begin) / 1e6, (run.end - run.begin) / 1e6)
        )
    figure = new_figure(16, 1.8 + 0.7 * len(streams))
    axes = figure.subplots()
    for (row, kind), spans in bars.items():
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=COLOURS[kind])
    axes.set_yticks(range(len(streams)), [f"stream {number}" for number in streams])
    axes.set_xlabel("ms")
    axes.set_title(title)
    shown = {kind for _, kind in bars}
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in shown]
    figure.legend(handles=handles, ncols=6, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, path)
