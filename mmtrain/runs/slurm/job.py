"""Steps of a job in Python, which launch/slurm/pretrain.sbatch calls: ``start`` before the run and ``end`` after it.

``start`` prints the environment report on stderr and the folder of this attempt on stdout; its exit code is 0, 10 where
the run is finished, else that of a chain that has stopped. ``end`` prints what is to happen: ``finished``, ``requeue``,
``hand_over`` or ``stop``; its exit code is the job's.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from mmtrain.command_line import Parser, exit_code
from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.runs.slurm.environment_report import report_lines
from mmtrain.runs.slurm.restarts import FINISHED, begin, judge, newest_step, read_starts, write_starts

DONE_ALREADY = 10


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line: what to do, and behind ``--`` the options of launch/pretrain.py."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("start", "end"))
    parser.add_argument("--configs", type=Path, required=True, help="folder of YAML groups")
    parser.add_argument("--logs", default="", help="folder of logs (default: slurm in the run's folder)")
    parser.add_argument("--link", type=int, default=1, help="place of the job in its chain, from 1")
    parser.add_argument("--links", type=int, default=1, help="length of the chain")
    parser.add_argument("--attempt", type=Path, help="folder that `start` printed")
    parser.add_argument("--code", type=int, default=0, help="exit code of srun")
    given = sys.argv[1:] if argv is None else argv
    behind = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:behind])
    options.options = given[behind + 1 :]
    return options


def job_folder(config: PretrainConfig, logs: str = "") -> Path:
    """Return the folder of a run's job scripts, logs and record of starts."""
    chosen = logs or config.cluster.log_folder
    return Path(chosen) if chosen else Path(config.run.dir) / config.run.name / "slurm"


def start(options: argparse.Namespace, config: PretrainConfig) -> int:
    """Report, and begin an attempt unless the chain is at its end; returns the exit code."""
    print("\n".join(report_lines(config, options.configs.parent)), file=sys.stderr)
    folder, run = job_folder(config, options.logs), Path(config.run.dir) / config.run.name
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job = os.environ.get("SLURM_JOB_ID", "0")
    starts, verdict = begin(read_starts(folder), job, restarts == 0 and options.link == 1, newest_step(run))
    write_starts(folder, starts)
    if verdict is not None:
        print(f"job: {verdict.reason}", file=sys.stderr)
        return DONE_ALREADY if verdict.action == FINISHED else verdict.exit_code
    attempt = folder.absolute() / f"{job}-{restarts}"
    attempt.mkdir(parents=True, exist_ok=True)
    print(attempt)
    return 0


def end(options: argparse.Namespace, config: PretrainConfig) -> int:
    """Decide what follows, record and print it; returns the job's exit code."""
    folder, run = job_folder(config, options.logs), Path(config.run.dir) / config.run.name
    files = (options.attempt / "exit").glob("[0-9]*")
    codes = [int(text) for text in (path.read_text().strip() for path in files) if text.isdecimal()]
    starts, step = read_starts(folder), newest_step(run)
    verdict = judge(starts, codes, options.code, step, last_link=options.link >= options.links)
    if starts:
        write_starts(folder, [*starts[:-1], replace(starts[-1], reached=step, ending=verdict.action)])
    print(f"job: {verdict.reason}", file=sys.stderr)
    print(verdict.action)
    return verdict.exit_code


def main(argv: list[str] | None = None) -> int:
    """Take one step of a job; returns its exit code."""
    options = parse(argv)
    step = start if options.step == "start" else end
    return exit_code(lambda: step(options, compose(options.options, options.configs)))


if __name__ == "__main__":
    sys.exit(main())
