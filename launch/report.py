#!/usr/bin/env python
r"""Write what runs recorded as one HTML page: curves, experts, memory, needles, checkpoints, and what went wrong.

    python launch/report.py runs/first
    python launch/report.py runs/first runs/second runs/third --out three.html
    python launch/report.py runs/sweeps/mine

Several runs are laid over one another. A sweep's folder (points.jsonl, fit.json) is drawn with its fit. The file holds
all it needs and can be mailed: no browser fetches anything for it. A run may be at work meanwhile. docs/report.md says
what is on the page.

The exit code is 0, 2 for bad input, or 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtrain.command_line import Parser, exit_code


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a sweep")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the first folder)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    options = parse(argv)

    def write() -> None:
        from mmtrain.report.write import closing_line, write_report

        print(
            closing_line(write_report(options.paths, options.out, lambda line: print(f"note: {line}", file=sys.stderr)))
        )

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
