"""Heat maps of needles, depth by length, one for each kind, as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.log.console import count_text
from mmtrain.log.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

PLOT_NAME = "needles.png"
INK = "#4a5568"
MAX_NUMBERS = 120  # cells of a map from which on their numbers would not be read


def draw_heat_maps(record: Mapping[str, Any], out: Path, title: str | None = None) -> Path:
    """Draw the percentage of samples that passed: lengths from left to right, depths from top to bottom.

    Args:
        record: of one evaluation, as `metrics.jsonl` has it.
        out: the PNG.
        title: above the maps; None tells step, tokens and phase of the record.
    """
    cells = record["needle_cells"]
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = new_figure(5.5 * columns, 0.6 + 3.2 * rows)
    if title is None:
        title = (
            f"Needles after step {record['step']:,} ({count_text(record['tokens'])} tokens, phase {record['phase']})"
        )
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, kind in zip(panels, kinds, strict=False):
        image = _draw(axes, kind, [cell for cell in cells if cell["kind"] == kind])
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=list(panels), label="samples answered right, %", pad=0.01)
    return save_figure(figure, out)


def _draw(axes: Axes, kind: str, cells: Sequence[Mapping[str, Any]]) -> AxesImage:
    """Draw the map of one kind; lengths that are longer than the held-out text are starred."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    passed = {(cell["depth"], cell["length"]): cell["passed"] for cell in cells}
    table = [[passed[depth, length] for length in lengths] for depth in depths]
    image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="RdYlGn", vmin=0, vmax=100)
    repeated = {cell["length"] for cell in cells if cell["repeats"] > 1}
    names = [_length_text(length) + ("*" if length in repeated else "") for length in lengths]
    axes.set_xticks(range(len(lengths)), names, rotation=0 if len(lengths) < 9 else 45)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    mean = sum(cell["passed"] for cell in cells) / len(cells)
    axes.set_title(f"{kind}: {mean:.1f}%", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("tokens" + (" (* held-out text repeats)" if repeated else ""), color=INK)
    axes.set_ylabel("depth of the needle", color=INK)
    if len(cells) <= MAX_NUMBERS:
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color="black")
    return image


def _length_text(length: int) -> str:
    """Write 131072 as 128Ki and 1048576 as 1Mi, as options have them; other lengths in full."""
    for size, suffix in ((2**20, "Mi"), (2**10, "Ki")):
        if length % size == 0:
            return f"{length // size}{suffix}"
    return f"{length:,}"
