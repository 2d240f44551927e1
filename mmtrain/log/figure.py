"""Figures without a screen, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches. matplotlib is imported here, as it is slow to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, out: Path) -> Path:
    """Write a PNG in one atomic replacement, and return its path."""
    scratch = out.with_name(out.name + ".tmp")
    figure.savefig(scratch, format="png", dpi=130)
    scratch.replace(out)
    return out
