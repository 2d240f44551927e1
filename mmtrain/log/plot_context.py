"""Panel of a run's plot that shows how its context grew: tokens of a row and RoPE base, over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LENGTH, BASE = "#2f855a", "#6b46c1"


def context_grows(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether phases of the run differ in length of row or RoPE base."""
    return len({(step.get("seq_len"), step.get("rope_base")) for step in steps}) > 1


def draw_context(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    """Draw both on logarithmic scales of their own; a step's values hold for all of its tokens."""
    edges = [0, *(step["tokens"] for step in steps)]
    axes.stairs([step["seq_len"] for step in steps], edges, color=LENGTH, linewidth=1.8, baseline=None)
    _name_values(axes, "tokens a row", LENGTH, [step["seq_len"] for step in steps])
    other = axes.twinx()
    other.stairs([step["rope_base"] for step in steps], edges, color=BASE, linewidth=1.4, linestyle="--", baseline=None)
    _name_values(other, "RoPE base", BASE, [step["rope_base"] for step in steps])
    other.spines["top"].set_visible(False)


def _name_values(axes: Axes, name: str, color: str, values: Sequence[float]) -> None:
    """Put a tick at each value that the run had, and no other."""
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_yticks(sorted(set(values)), [f"{value:,.0f}" for value in sorted(set(values))], color=color, fontsize=8)
    axes.set_ylabel(name, color=color)
