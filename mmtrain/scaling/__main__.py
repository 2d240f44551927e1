"""Fit the scaling laws of a sweep: ``python -m mmtrain.scaling FOLDER [--target-flops X]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mmtrain.command_line import Parser, exit_code
from mmtrain.output import say
from mmtrain.scaling.fit import FitOptions
from mmtrain.scaling.surface import RESAMPLES
from mmtrain.scaling.sweep import fit_sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print the page, and return the exit code."""
    parser = Parser(prog="python -m mmtrain.scaling", description="Fit the scaling laws of a sweep's points.jsonl.")
    parser.add_argument("folder", type=Path, help="the sweep's folder; fit.json, fit.md and fit.png are written there")
    parser.add_argument("--target-flops", type=float, metavar="X", help="predict the loss at this compute in FLOP")
    parser.add_argument("--intermediate", choices=("none", "frontier", "all"), default="frontier",
                        help="fits that use validations on the way; all: of runs with a constant learning rate "
                        "(default %(default)s)")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap (default %(default)s)")
    given = parser.parse_args(arguments)

    def fit() -> None:
        found = fit_sweep(given.folder, FitOptions(given.target_flops, given.intermediate, given.resamples))
        say(found.text)
        say(found.summary)

    return exit_code(fit)


if __name__ == "__main__":
    sys.exit(main())
