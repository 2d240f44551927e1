"""What a sweep does once all its runs are done: the fit of its points."""

from __future__ import annotations

from pathlib import Path

from mmtrain.output import say
from mmtrain.scaling.sweep import fit_sweep


def fit_and_tell(folder: Path) -> str:
    """Fit the laws that a sweep's points support, print them, and return the command that comes next.

    Raises:
        ConfigError: there are no points.
        OSError: the folder cannot be written.
    """
    fit = fit_sweep(folder)
    say(fit.text)
    say(fit.summary)
    return f"python -m mmtrain.scaling {folder} --target-flops X predicts the loss at X"
