#!/usr/bin/env python
r"""Train a few steps under several layouts and say whether they train the same model.

    python launch/compare.py model=tiny stage=quickstart data.path=DIR \
        --layout "1" --layout "4 parallel.tp=2 parallel.ep=2" --layout "8 parallel.tp=2 parallel.ep=4"

A layout is a number of processes and the overrides that belong to it. Each runs in processes of its own, on this
machine, from the same initial weights and data, in fp32 unless told otherwise. Prints loss and gradient norm of every
step, and the parameter whose gradient at the first step differs most from the first layout's; the exit code is 1 if a
difference is above the tolerance, 2 if a layout could not run. Gradients are compared by 16 random projections, which
tell how far two are apart to within a factor of two, whatever the size of the model. In bf16 rounding alone moves a
router's gradient by percents: compare in fp32 to find small errors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtrain.command_line import Parser, exit_code

PRETRAIN = Path(__file__).resolve().with_name("pretrain.py")  # what every layout starts


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: options, and the Hydra overrides that all layouts share."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", required=True, metavar='"N OVERRIDES"', help="twice or more")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default %(default)s)")
    parser.add_argument("--tolerance", type=float,
                        help="largest relative difference, of any figure and any parameter's gradient (default: by "
                             "precision; fp32 5e-6 and 1e-5, bf16 2e-3 and 2e-1)")  # fmt: skip
    parser.add_argument("--keep", metavar="DIR", help="keep the runs there (default: a folder that goes away)")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Compare; the exit code is 0, 1 past the tolerance, or 2 where a layout could not run."""
    options, overrides = parse(argv)
    from mmtrain.runs.compare import compare

    return exit_code(
        lambda: compare(PRETRAIN, options.layout, overrides, options.steps, options.tolerance, options.keep)
    )


if __name__ == "__main__":
    sys.exit(main())
