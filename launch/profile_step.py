#!/usr/bin/env python
"""Profile a few steps of a run, and report in a page why it is as fast as it is.

    torchrun --standalone --nproc-per-node N launch/profile_step.py model=tiny data.path=DIR run.name=NAME

Options of the run are those of launch/pretrain.py, and it is trained as there, from its newest checkpoint under
run.resume=auto; but no checkpoint is written, and no run folder. Some steps warm up, 5 are timed with nothing that
watches them, and the last are profiled. The folder gets report.txt, report.json, trace.json (Chrome's and Perfetto's
format) and, of a GPU, timeline.png. docs/profiling.md says how to read them.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from pathlib import Path

from mmtrain.command_line import Parser
from mmtrain.config import PretrainConfig
from mmtrain.config.cli import hydra_entry, note

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: options of the profile, and the Hydra overrides of the run."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2, help="steps that are profiled (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=5,
                        help="steps before; CUDA graphs are recorded in the first (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report (default profiles/NAME)")
    parser.add_argument("--memory", action="store_true",
                        help="take a snapshot of the GPU's memory in one more step")  # fmt: skip
    return parser.parse_known_args(argv)


def main() -> None:
    """Profile with the options of the command line; exit codes: see :func:`~mmtrain.config.cli.hydra_entry`."""
    faulthandler.enable()  # a crash within a library says where, on every rank
    options, overrides = parse()
    sys.argv[1:] = overrides  # Hydra reads the rest from there

    def profile(config: PretrainConfig) -> None:
        from mmtrain.runs.profile_step import profile_step
        from mmtrain.runs.step_profiler import ProfileOptions

        profile_step(config, ProfileOptions(options.steps, options.warmup, options.out, options.memory), note)

    hydra_entry(profile, CONFIGS)


if __name__ == "__main__":
    main()
