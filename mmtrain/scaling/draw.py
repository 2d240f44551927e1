"""The plot of a fit: loss over compute, isoFLOP parabolas, best sizes and tokens, and residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmtrain.log.figure import new_figure, save_figure
from mmtrain.log.plot import INK
from mmtrain.scaling.compute import ComputeLaws
from mmtrain.scaling.fit import ArchitectureFit
from mmtrain.scaling.paper import PFLOP_S_DAY, TABLE_2, PaperRow
from mmtrain.scaling.power import PowerFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KNOWN = {"softmax": "#2b6cb0", "lightning": "#c05621", "hybrid": "#b83280"}
COMPUTE, SIZE = "PFLOP/s-days", "activated parameters"
PANELS = {  # title, and labels of the axes
    "loss": ("Loss over compute: points, frontier, its law; dotted: MiniMax-01 Table 2", COMPUTE, "nats per token"),
    "isoflop": ("IsoFLOP groups and their minima", SIZE, "nats per token"),
    "residuals": ("Residuals of L(N, D)", COMPUTE, "measured / fitted - 1, %"),
    "parameters": ("N_opt(C): dots isoFLOP minima, squares frontier; dotted: the paper", COMPUTE, SIZE),
    "tokens": ("D_opt(C)", COMPUTE, "tokens"),
}
OTHERS = ("#2f855a", "#6b46c1", "#b7791f", "#0987a0", "#9b2c2c", "#4a5568")


def draw_fits(fits: Sequence[ArchitectureFit], out: Path) -> Path:
    """Draw all architectures into one PNG, written whole or not at all, and return its path."""
    figure = new_figure(13, 12)
    panels = figure.subplot_mosaic([["loss", "loss"], ["isoflop", "residuals"], ["parameters", "tokens"]])
    colors = _colors(fits)
    for fit in fits:
        _draw_loss(panels["loss"], fit, colors[fit.label])
        _draw_parabolas(panels["isoflop"], fit, colors[fit.label])
        _draw_residuals(panels["residuals"], fit, colors[fit.label])
        for name in ("parameters", "tokens"):
            _draw_best(panels[name], fit, name, colors[fit.label])
    for name, (title, x, y) in PANELS.items():
        _style(panels[name], title, x, y)
    for name in ("loss", "parameters", "tokens"):
        panels[name].set_yscale("log")
    for name in ("isoflop", "residuals"):
        if not panels[name].has_data():
            panels[name].text(0.5, 0.5, "none", ha="center", va="center", color=INK, transform=panels[name].transAxes)
    panels["loss"].legend(frameon=False, loc="upper right", fontsize=8)
    return save_figure(figure, out)


def _colors(fits: Sequence[ArchitectureFit]) -> dict[str, str]:
    """Give the paper's architectures fixed colours, and others those that are left, in turn."""
    others = [fit.label for fit in fits if fit.label not in KNOWN]
    return KNOWN | {label: OTHERS[number % len(OTHERS)] for number, label in enumerate(others)}


def _draw_loss(axes: Axes, fit: ArchitectureFit, color: str) -> None:
    """Show training curves as thin lines, ends as dots, the frontier as squares, and laws over the data's range."""
    for run in dict.fromkeys(point.run for point in fit.points):
        curve = sorted((point for point in fit.points if point.run == run), key=lambda point: point.flops)
        if len(curve) > 1:
            xs = [point.flops / PFLOP_S_DAY for point in curve]
            axes.plot(xs, [point.loss for point in curve], color=color, linewidth=0.6, alpha=0.35)
    xs, ys = [p.flops / PFLOP_S_DAY for p in fit.ends], [p.loss for p in fit.ends]
    axes.plot(xs, ys, "o", color=color, markersize=3, alpha=0.5, label=None if fit.frontier_laws else fit.label)
    frontier = [point.flops / PFLOP_S_DAY for point in fit.frontier]
    axes.plot(
        frontier, [point.loss for point in fit.frontier], "s", color=color, markersize=4.5, markerfacecolor="white"
    )
    laws = fit.frontier_laws or fit.isoflop_laws
    if laws:
        _draw_law(axes, laws.loss, color, f"{fit.label}: {laws.loss.beta.value:.3g} C^{laws.loss.alpha.value:.4f}")
    _draw_paper(axes, fit, lambda row: row.loss.at, color)
    for prediction in fit.predictions[-1:]:  # L(N, D), where there is one
        low, value, high = prediction.loss.low, prediction.loss.value, prediction.loss.high
        error = [[value - low], [high - value]]
        axes.errorbar([prediction.flops / PFLOP_S_DAY], [value], error, fmt="*", color=color, markersize=9, capsize=3)


def _draw_law(axes: Axes, law: PowerFit, color: str, label: str | None = None) -> None:
    """Draw a law over its points' range, and its interval as a band."""
    grid = np.geomspace(law.low_x, law.high_x, 60)
    at = [law.at(float(x)) for x in grid]
    axes.plot(grid, [one.value for one in at], color=color, linewidth=1.6, label=label)
    axes.fill_between(grid, [one.low for one in at], [one.high for one in at], color=color, alpha=0.12, linewidth=0)


def _draw_paper(
    axes: Axes, fit: ArchitectureFit, law: Callable[[PaperRow], Callable[[float], float]], color: str
) -> None:
    if row := TABLE_2.get(fit.architecture):
        computes = [point.flops for point in fit.points]
        grid = np.geomspace(min(computes), max(computes), 60)
        values = [law(row)(float(x)) for x in grid]
        axes.plot(grid / PFLOP_S_DAY, values, color=color, linewidth=1.6, linestyle=":")


def _draw_parabolas(axes: Axes, fit: ArchitectureFit, color: str) -> None:
    for minimum in fit.minima:
        axes.plot(minimum.sizes, minimum.losses, "o", color=color, markersize=3, alpha=0.6)
        grid = np.geomspace(minimum.sizes[0], minimum.sizes[-1], 60)
        axes.plot(
            grid, minimum.loss + minimum.curvature * np.log(grid / minimum.parameters) ** 2, color=color, linewidth=1.2
        )
        axes.plot([minimum.parameters], [minimum.loss], "D", color=color, markersize=5, markerfacecolor="white")


def _draw_residuals(axes: Axes, fit: ArchitectureFit, color: str) -> None:
    law = fit.surface
    if law is None:
        return
    xs = [point.flops / PFLOP_S_DAY for point in fit.surface_points]
    axes.plot(xs, [100 * float(np.expm1(one)) for one in law.residuals], "o", color=color, markersize=3.5, alpha=0.7)
    axes.axhline(0, color=INK, linewidth=0.8)


def _draw_best(axes: Axes, fit: ArchitectureFit, name: str, color: str) -> None:
    """Show N_opt or D_opt: what minima and frontier say, and the law of the minima, else of the frontier."""
    xs, ys = [one.flops / PFLOP_S_DAY for one in fit.minima], [getattr(one, name) for one in fit.minima]
    axes.plot(xs, ys, "o", color=color, markersize=5)
    field = "activated" if name == "parameters" else name
    xs, ys = [p.flops / PFLOP_S_DAY for p in fit.frontier], [getattr(p, field) for p in fit.frontier]
    axes.plot(xs, ys, "s", color=color, markersize=4.5, markerfacecolor="white")
    laws: ComputeLaws | None = fit.isoflop_laws or fit.frontier_laws
    law = getattr(laws, name) if laws else None
    if law:
        _draw_law(axes, law, color)
    _draw_paper(axes, fit, lambda row: getattr(row, name).at, color)


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
