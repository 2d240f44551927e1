"""The fit of a sweep's folder: `fit.json`, `fit.md` and `fit.png` beside its points."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.checkpoint.durable import write_text
from mmtrain.scaling.draw import draw_fits
from mmtrain.scaling.fit import ArchitectureFit, FitOptions, fit_points
from mmtrain.scaling.points import read_points
from mmtrain.scaling.record import record_of
from mmtrain.scaling.report import blocks_of
from mmtrain.scaling.tables import as_markdown, as_text

JSON_NAME, PAGE_NAME, PLOT_NAME = "fit.json", "fit.md", "fit.png"


@dataclass(frozen=True)
class SweepFit:
    """The fitted laws of a sweep.

    Attributes:
        folder: of the sweep.
        fits: by architecture and number of experts.
        files: that were written.
        text: the page for a terminal.
    """

    folder: Path
    fits: Sequence[ArchitectureFit]
    files: Sequence[Path]
    text: str

    @property
    def summary(self) -> str:
        """The line that closes a fit: what was fitted, and where the files are."""
        parts = []
        for fit in self.fits:
            laws = {
                "frontier": fit.frontier_laws,
                "isoFLOP": fit.isoflop_laws,
                "L(N, D)": fit.surface,
                "L(P, T)": fit.mixture,
            }
            found = ", ".join(name for name, law in laws.items() if law) or "nothing"
            parts.append(f"{fit.label}: {found}")
        return f"fitted {'; '.join(parts)} -> {self.folder}: {', '.join(path.name for path in self.files)}"


def fit_sweep(folder: Path, options: FitOptions | None = None) -> SweepFit:
    """Fit all laws that the points of a sweep support, and write page, record and plot beside them.

    Args:
        folder: with `points.jsonl`.
        options: of the fit; None: the defaults.

    Raises:
        ConfigError: no points, or a line that is none.
        OSError: the folder cannot be written.
    """
    folder, options = Path(folder), options or FitOptions()
    fits = fit_points(read_points(folder), options)
    blocks = blocks_of(fits)
    record = json.dumps(record_of(fits, options), indent=1, allow_nan=False)
    write_text(folder / JSON_NAME, record + "\n")
    write_text(folder / PAGE_NAME, as_markdown(f"Scaling laws of {folder.resolve().name}", blocks))
    files = [folder / JSON_NAME, folder / PAGE_NAME, draw_fits(fits, folder / PLOT_NAME)]
    return SweepFit(folder, fits, files, as_text(blocks))
