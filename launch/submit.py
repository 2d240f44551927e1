#!/usr/bin/env python
"""Submit a run as a Slurm job: `python launch/submit.py cluster=slurm_h800 cluster.nodes=4 +stage=long_ctx ...`.

Options are those of launch/pretrain.py. Everything is checked first: the configuration, the layout and memory of every
phase on the job's processes, the partition, whether the nodes share the folders, and room for two checkpoints. A job
that is preempted or comes to its time limit saves and goes back into the queue. docs/clusters.md tells the rest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtrain.command_line import Parser, exit_code
from mmtrain.output import say

LAUNCH = Path(__file__).resolve().parent
CONFIGS = LAUNCH.parent / "configs"


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: options of the submission, and those of launch/pretrain.py."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="show plan, checks and script; submit nothing")
    parser.add_argument("--chain", type=int, default=1, metavar="N",
                        help="N jobs, each goes on where the one before it ended (default %(default)s)")  # fmt: skip
    parser.add_argument("--array", action="store_true", help="the chain is one job array, a task at a time")
    parser.add_argument("--after", metavar="JOB", help="start when that job has ended well")
    options, overrides = parser.parse_known_args(argv)
    if wrong := [text for text in overrides if text.startswith("-")]:
        parser.error(f"unknown option {wrong[0]}; a chain takes --chain, --array and --after")
    return options, overrides


def submit(options: argparse.Namespace, overrides: list[str]) -> None:
    """Check the run and its jobs, and show or submit them (ConfigError)."""
    from mmtrain.runs.slurm.submit import Chain, prepare_job, submit_job

    chain = Chain(options.chain, options.array, options.after)
    prepared = prepare_job(overrides, LAUNCH, CONFIGS, chain, ask_slurm=not options.dry_run)
    if options.dry_run:
        say("\n".join(prepared.lines()))
        return
    ids = submit_job(prepared)
    for line in prepared.notes:
        say(line)
    say(f"submitted {', '.join(ids)}; logs: {prepared.folder}")


def main(argv: list[str] | None = None) -> int:
    """Submit; the exit code is 0, or 2 for a wrong input."""
    options, overrides = parse(argv)
    return exit_code(lambda: submit(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
