#!/usr/bin/env python
r"""Run a sweep: a grid of architectures, sizes and lengths, planned first, resumable, fitted at its end.

    python launch/sweep.py -m sweep=scaling_law data.path=DIR --plan
    python launch/sweep.py -m sweep=tiny_cpu
    python launch/sweep.py -m sweep=tiny_cpu sweep.name=rates sweep.lr=1e-3,3e-3 optim.beta2=0.95,0.99

The files of configs/sweep are the sweeps. Options that begin with sweep. are the sweep's, all others are those of
launch/pretrain.py, for each of its runs; several values, parted by commas, multiply the grid. A run's learning rate is
sweep.lr (optim.lr means the same).

The plan is printed before anything starts: every run with its parameters, tokens, operations and time. The same command
goes on with a sweep that was stopped. Runs lie in SWEEP/runs as those of launch/pretrain.py do, their losses in
SWEEP/points.jsonl. docs/sweeps.md says more.

The exit code is 0, 1 if runs failed, 2 for bad input, 130 after Ctrl-C, which lets the runs at work save themselves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtrain.command_line import Parser, exit_code

PRETRAIN = Path(__file__).resolve().with_name("pretrain.py")  # what every run starts
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: flags, and overrides as Hydra has them."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true", help="options may have several values, as a,b,c")
    parser.add_argument("--plan", action="store_true", help="print the plan and start nothing")
    parser.add_argument("--retry", action="store_true", help="start the runs that failed again too")
    timing = "first run a few steps of every architecture and size, so that the plan knows its time"
    parser.add_argument("--timing", action="store_true", help=timing)
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a sweep; returns the exit code."""
    options, overrides = parse(argv)
    from mmtrain.runs.sweep.run_sweep import SweepOptions, run_sweep

    flags = SweepOptions(options.multirun, options.plan, options.retry, options.timing)
    again = "error: stopped, and the runs at work saved themselves; the same command goes on with the sweep"
    return exit_code(lambda: run_sweep(PRETRAIN, CONFIGS, overrides, flags), lambda: print(again, file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
