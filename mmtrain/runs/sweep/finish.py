"""What a sweep does once all its runs are done: the fit of its points."""

from __future__ import annotations

from pathlib import Path


def finish(folder: Path) -> str:
    """Fit the points of a sweep and return the command that comes next."""
    return f"the points lie in {folder}"
