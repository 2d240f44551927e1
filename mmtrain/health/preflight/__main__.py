"""Command of the pre-flight: ``node`` on each node, ``judge`` on one host."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from mmtrain.command_line import Parser, exit_code
from mmtrain.config.installation import commit_of, versions
from mmtrain.errors import ConfigError
from mmtrain.health.preflight.judge import judge_folder
from mmtrain.health.preflight.node import NodeUnderTest


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("step", choices=("node", "judge"))
    parser.add_argument("--folder", type=Path, required=True, help="shared by all nodes")
    parser.add_argument("--nodes", required=True, help="names of all nodes, between commas")
    parser.add_argument("--node", help="this node's name (default: Slurm's, else the host's)")
    parser.add_argument("--processes", type=int, default=1, help="ranks of a node (default %(default)s)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a node; 0 measures the CPU (default)")
    parser.add_argument("--checkout", type=Path, default=Path.cwd(), help="whose commit is told (default: here)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> int:
    """Test this node, or judge all; returns the exit code.

    Raises:
        ConfigError: this host is none of the nodes.
    """
    nodes = options.nodes.split(",")
    if options.step == "node":
        node = options.node or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        if node not in nodes:
            raise ConfigError("--nodes", options.nodes, f"{node} is none of them", "give --node NAME")
        test = NodeUnderTest(options.folder, node, nodes, options.processes, options.gpus)
        return test.run(test.facts(commit_of(options.checkout), versions()))
    found = judge_folder(options.folder, nodes, options.processes, options.gpus)
    for line in found.lines:
        print(f"pre-flight: {line}", file=sys.stderr)
    for node, faults in found.faults.items():
        print(f"pre-flight: {node} is left out: {'; '.join(faults)}", file=sys.stderr)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("good", found.good), ("bad", [node for node in nodes if node not in found.good])):
        (options.folder / name).write_text(",".join(chosen))
    print(",".join(found.good))
    return 0 if found.good == nodes else 1


def main(argv: list[str] | None = None) -> int:
    """Run one step; returns 0 where all is well, 1 for a bad node, 2 for a wrong input."""
    options = parse(argv)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
