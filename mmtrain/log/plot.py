"""Loss and router load of a run as one PNG, from `metrics.jsonl` alone: ``python -m mmtrain.log.plot runs/x``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mmtrain.log.figure import new_figure, save_figure
from mmtrain.log.metrics import FILE_NAME, read_metrics
from mmtrain.log.plot_context import context_grows, draw_context

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

PLOT_NAME = "plot.png"
TRAIN, VALID, DROP, INK = "#2b6cb0", "#c05621", "#b83280", "#4a5568"
MAX_LAYERS_NAMED = 8
MAX_POINTS_SMOOTHED = 400


def plot_run(run_dir: Path, out: Path | None = None) -> Path:
    """Draw loss and router load of a run as a PNG.

    Args:
        run_dir: the folder with `metrics.jsonl`.
        out: the PNG; `plot.png` in the run folder when None.

    Returns:
        The path of the PNG.

    Raises:
        FileNotFoundError: no metrics there.
        ValueError: no training step in them.
    """
    records = read_metrics(Path(run_dir))
    steps = [record for record in records if record.get("loss") is not None]
    if not steps:
        raise ValueError(f"{Path(run_dir) / FILE_NAME}: no training step to draw")
    out = Path(out or Path(run_dir) / PLOT_NAME)
    return save_figure(_draw(records, steps, Path(run_dir).resolve().name), out)


def _draw(records: Records, steps: Records, title: str) -> Figure:
    """Lay the panels out: loss, the context where it grows, and the router's three panels for a mixture."""
    routed = [record for record in steps if record.get("router_load")]
    rows, heights = [["loss", "loss"]], [1.5]
    if context_grows(steps):
        rows, heights = [*rows, ["context", "context"]], [*heights, 0.7]
    if routed:
        rows, heights = [*rows, ["time", "drop"], ["end", "end"]], [*heights, 1, 1.1]
    figure = new_figure(11, max(4.2, 2.2 * sum(heights)))
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    panels = figure.subplot_mosaic(rows, height_ratios=heights)
    _draw_loss(panels["loss"], records, steps)
    if "context" in panels:
        _style(panels["context"], "Context", "tokens a row")
        draw_context(panels["context"], steps)
    if routed:
        _draw_load_over_time(panels["time"], routed)
        _draw_drop_rate(panels["drop"], steps)
        _draw_load_at_end(panels["end"], routed[-1])
    return figure


def _draw_loss(axes: Axes, records: Records, steps: Records) -> None:
    tokens, losses = [record["tokens"] for record in steps], [record["loss"] for record in steps]
    smooth_at, smooth = _smoothed(tokens, losses)
    axes.plot(tokens, losses, color=TRAIN, linewidth=0.8, alpha=0.3)
    axes.plot(smooth_at, smooth, color=TRAIN, linewidth=1.8, label=f"training: {smooth[-1]:.3f}")
    valid = [record for record in records if record.get("val_loss") is not None]
    if valid:
        label = f"validation: {valid[-1]['val_loss']:.3f}"
        if valid[-1].get("val_bits_per_byte") is not None:
            label += f" ({valid[-1]['val_bits_per_byte']:.3f} bits per byte)"
        xs, ys = [record["tokens"] for record in valid], [record["val_loss"] for record in valid]
        axes.plot(xs, ys, color=VALID, marker="o", markersize=4, linewidth=1.2, label=label)
    _shade_phases(axes, steps)
    _style(axes, "Loss", "nats per token")
    axes.set_ylim(*_loss_range(losses, [record["val_loss"] for record in valid]))
    axes.legend(frameon=False, loc="upper right")


def _shade_phases(axes: Axes, steps: Records) -> None:
    """Shade every second phase and name each with its sequence length, when there are several."""
    starts = [i for i, step in enumerate(steps) if i == 0 or step.get("phase") != steps[i - 1].get("phase")]
    if len(starts) < 2:
        return
    for count, start in enumerate(starts):
        end = starts[count + 1] if count + 1 < len(starts) else len(steps) - 1
        left = steps[start - 1]["tokens"] if start else 0
        right = steps[end - 1]["tokens"] if count + 1 < len(starts) else steps[end]["tokens"]
        if count % 2:
            axes.axvspan(left, right, color="#edf2f7", zorder=0)
        name, length = steps[start].get("phase"), steps[start].get("seq_len")
        text = f"{name}\n{length:,} tokens" if length else str(name)
        axes.annotate(text, (left, 0.03), (4, 0), axes.get_xaxis_transform(), "offset points", fontsize=8, color=INK)


def _draw_load_over_time(axes: Axes, routed: Records) -> None:
    """Show each layer's busiest expert over the run: 1 is an even share, E is collapse onto one expert."""
    layers = len(routed[0]["router_load"])
    peaks = [[_relative(row)[-1] for row in record["router_load"]] for record in routed]
    columns = list(zip(*peaks, strict=True))
    image = axes.imshow(
        columns,
        aspect="auto",
        interpolation="nearest",
        cmap="magma_r",
        vmin=1.0,
        vmax=max(2.0, max(map(max, columns))),
        extent=(routed[0]["tokens"], max(routed[-1]["tokens"], routed[0]["tokens"] + 1), layers - 0.5, -0.5),
    )
    _style(axes, "Busiest expert of each layer", "layer", grid=False)
    _name_layers(axes, layers)
    axes.figure.colorbar(image, ax=axes, label="load / even share", pad=0.01)


def _draw_drop_rate(axes: Axes, steps: Records) -> None:
    """Show the mean drop rate, the mean without the global router, and the range over layers, where recorded."""
    layered = [step for step in steps if step.get("drop_rate_per_layer") and None not in step["drop_rate_per_layer"]]
    if layered:
        tokens = [step["tokens"] for step in layered]
        low = [100 * min(step["drop_rate_per_layer"]) for step in layered]
        high = [100 * max(step["drop_rate_per_layer"]) for step in layered]
        axes.fill_between(tokens, low, high, color=DROP, alpha=0.15, linewidth=0, label="range over layers")
    for key, label, style in (("drop_rate", "mean", "-"), ("drop_rate_alone", "mean without the global router", ":")):
        mean = [step for step in steps if step.get(key) is not None]
        if mean:
            xs, rates = _smoothed([step["tokens"] for step in mean], [100 * step[key] for step in mean])
            axes.plot(xs, rates, color=DROP, linewidth=1.6, linestyle=style, label=label)
    _style(axes, "Assignments dropped", "%")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right")


def _draw_load_at_end(axes: Axes, record: Mapping[str, Any]) -> None:
    """Show the load of every expert of every layer at the end, busiest last: an even router is one flat colour."""
    rows = [_relative(row) for row in record["router_load"]]
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0.0, vmax=2.0)
    axes.set_title(f"Load of every expert at step {record['step']:,}", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("experts of a layer, least to most loaded", color=INK)
    axes.set_ylabel("layer", color=INK)
    _name_layers(axes, len(rows))
    experts = len(rows[0])
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    if len(rows) * experts <= 160:
        for layer, row in enumerate(rows):
            for expert, load in enumerate(row):
                shade = "white" if abs(load - 1) > 0.7 else INK
                axes.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=7, color=shade)
    axes.figure.colorbar(image, ax=axes, label="load / even share", pad=0.01, extend="max")


def _relative(loads: Sequence[float]) -> list[float]:
    """Sort the loads of a layer's experts, as multiples of the even share."""
    known = [load or 0.0 for load in loads]  # null where a step was not finite
    mean = sum(known) / len(known)
    return sorted(load / mean if mean else 0.0 for load in known)


def _smoothed(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return medians over about 2% of the points, which a spike does not move, at up to 400 places.

    The window shrinks towards the start, where a loss falls steeply, and loses its right half towards the end.
    """
    if not ys:
        return [], []
    half, last = max(2, len(ys) // 100), len(ys) - 1
    places = sorted({round(i * last / MAX_POINTS_SMOOTHED) for i in range(MAX_POINTS_SMOOTHED + 1)})
    return [xs[i] for i in places], [median(ys[i - min(half, i) : i + min(half, i) + 1]) for i in places]


def _loss_range(losses: Sequence[float], valid: Sequence[float]) -> tuple[float, float]:
    """Fit the axis to the curve; a few spikes may leave it, the first steps may not."""
    shown = sorted(losses)
    high = max(losses[0], shown[int(0.995 * (len(shown) - 1))], *valid)
    low = min(shown[0], *valid) if valid else shown[0]
    margin = 0.06 * (high - low) or 0.5
    return low - 3 * margin, high + margin


def _name_layers(axes: Axes, layers: int) -> None:
    axes.set_yticks(range(0, layers, -(-layers // MAX_LAYERS_NAMED)))


def _style(axes: Axes, title: str, label: str, grid: bool = True) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("tokens", color=INK)
    axes.set_ylabel(label, color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.6)


def main(arguments: Sequence[str]) -> int:
    """Redraw the runs given on the command line; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m mmtrain.log.plot RUN_FOLDER...", file=sys.stderr)
        return 0 if arguments else 2
    for run_dir in arguments:
        try:
            print(plot_run(Path(run_dir)))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
