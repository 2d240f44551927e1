"""The plot of a result: time against length, and how near the floor the attention rows come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR_GROUPS = ("lightning", "few_heads", "varlen")
OURS, PEER, SOFTMAX = "#1f77b4", "#ff7f0e", "#7f7f7f"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 7), layout="constrained")
    figure.suptitle(f"Lightning attention on one {result['device']}, bf16, heads of 128 ({result['date']})")
    draw_curve(left, result["rows"])
    draw_bars(right, result["rows"], result["copy_gbps"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curve_points(rows: list[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Lengths and times of one line; errors and gaps are left out."""
    points = []
    for row in rows:
        value = row["extra"].get(key) if key == "softmax_ms" else row[key]
        if row["group"] == "curve" and isinstance(value, int | float) and "tokens" in row["extra"]:
            points.append((row["extra"]["tokens"], value))
    return [tokens for tokens, _ in points], [ms for _, ms in points]


def draw_curve(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    """Forward and backward against length."""
    lines = (
        ("ours_ms", "lightning, ours", OURS, "o"),
        ("peer_ms", "FLA chunk_simple_gla", PEER, "s"),
        ("softmax_ms", "softmax, cuDNN, causal, 64:8 heads", SOFTMAX, "^"),
    )
    drawn = False
    for key, label, colour, marker in lines:
        tokens, times = curve_points(rows, key)
        if tokens:
            axes.plot(tokens, times, color=colour, marker=marker, label=label)
            drawn = True
    axes.set(title="Forward and backward, 64 heads", xlabel="length (tokens)", ylabel="time (ms)")
    if not drawn:
        return empty(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def bars(rows: list[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Label, our fraction of the floor and the peer's (0 where not measured)."""
    found = []
    for row in rows:
        if row["group"] in BAR_GROUPS and row["floor_ms"]:
            theirs = row["floor_ms"] / row["peer_ms"] if isinstance(row["peer_ms"], int | float) else 0.0
            found.append((f"{row['name']}, {row['shape'].removesuffix(' D=128')}", row["of_floor"] or 0.0, theirs))
    return found


def draw_bars(axes: Axes, rows: list[Mapping[str, Any]], copy_gbps: float) -> None:
    """Fractions of the floor, the first row on top."""
    found = bars(rows)
    axes.set(
        title="Nearness to the floor of bytes moved", xlabel=f"fraction of the floor (copy at {copy_gbps:.0f} GB/s)"
    )
    if not found:
        return empty(axes)
    places = range(len(found))
    axes.barh([p - 0.2 for p in places], [ours for _, ours, _ in found], 0.4, color=OURS, label="ours")
    axes.barh([p + 0.2 for p in places], [theirs for *_, theirs in found], 0.4, color=PEER, label="FLA")
    axes.set_yticks(list(places), [label for label, *_ in found], fontsize=8)
    axes.set_xlim(0, max(1.0, *(max(ours, theirs) for _, ours, theirs in found)))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="lower right")


def empty(axes: Axes) -> None:
    """Say that there is nothing to draw."""
    axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
