#!/usr/bin/env python
r"""Look into checkpoints: what is in one, in what two differ, and whether they are whole.

    python launch/checkpoint.py runs/first
    python launch/checkpoint.py runs/first/checkpoints/step-00000100 runs/first/checkpoints/step-00000200
    python launch/checkpoint.py --verify runs/

One path, of a run or a checkpoint, is summed up: position, layout that wrote it, parameters, sizes, integrity, and
norms of weights and moments by layer. Of a run it is the newest checkpoint. Two paths are compared: options, shapes,
and the norm of the difference by layer. With --verify, every checkpoint at or below each folder is read against its
checksums and gets a line. Tensors are read one at a time, in one process, whatever layout wrote them. With --quick none
is read.

The exit code is 0, 1 if a checkpoint is damaged, 2 for bad input, 130 after Ctrl-C, or 141 where standard output was
closed, as by `| head`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from mmtrain.command_line import Parser, byte_bar, exit_code
from mmtrain.errors import ConfigError

DAMAGED = 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run folder, or one of its checkpoints")
    parser.add_argument(
        "--verify", action="store_true", help="read all checkpoints of these folders, runs or folders of runs"
    )
    parser.add_argument("--quick", action="store_true", help="read no tensors: names, sizes and small files alone")
    parser.add_argument("--json", action="store_true", help="write JSON for programs")
    options = parser.parse_args(argv)
    if not options.verify and len(options.paths) > 2:
        parser.error("one path to sum up, or two to compare; more with --verify")
    return options


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit code.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    for path in options.paths:
        if not path.is_dir():
            raise ConfigError("path", path, "no such folder", "give a run folder or a checkpoint")
    if options.verify:
        return verify(options)
    if len(options.paths) == 2:
        return compare(options)
    return sum_up(options)


def sum_up(options: argparse.Namespace) -> int:
    """Tell what is in a checkpoint."""
    from mmtrain.checkpoint.contents import bytes_to_read, contents
    from mmtrain.checkpoint.contents_text import contents_lines
    from mmtrain.checkpoint.damage import damage_of
    from mmtrain.checkpoint.tensors import StoredTensors

    path = chosen(options.paths[0])
    total = 0 if options.quick or damage_of(path) else bytes_to_read(StoredTensors(path)) + shard_bytes(path)
    with byte_bar("reading", total) as told:
        found = contents(path, options.quick, told)
    write(found, contents_lines(found), options.json)
    return DAMAGED if found["integrity"] == "damaged" else 0


def compare(options: argparse.Namespace) -> int:
    """Tell in what two checkpoints differ."""
    from mmtrain.checkpoint.contents import bytes_to_read, difference
    from mmtrain.checkpoint.contents_text import difference_lines
    from mmtrain.checkpoint.damage import damage_of
    from mmtrain.checkpoint.tensors import StoredTensors

    paths = [chosen(path) for path in options.paths]
    for path in paths:
        if damage := damage_of(path):
            print(f"error: {damage}", file=sys.stderr)
            return DAMAGED
    total = 0 if options.quick else sum(bytes_to_read(StoredTensors(path)) for path in paths)
    with byte_bar("comparing", total) as told:
        found = difference(*paths, options.quick, told)
    write(found, difference_lines(found), options.json)
    return 0


def verify(options: argparse.Namespace) -> int:
    """Read every checkpoint of some folders, and give each a line as soon as it is known."""
    from mmtrain.checkpoint.contents import integrity
    from mmtrain.checkpoint.listing import checkpoints_below

    paths = [found for path in options.paths for found in checkpoints_below(path)]
    if not paths:
        raise ConfigError(
            "path", options.paths[0], "holds no checkpoint", "give a checkpoint, a run, or a folder of runs"
        )
    results = []
    with byte_bar("verifying", 0 if options.quick else sum(map(shard_bytes, paths))) as told:
        for path in paths:
            state, line = integrity(path, options.quick, told)
            results.append({"path": str(path), "integrity": state, "line": line})
            if not options.json:
                print(f"{state:<10} {path}: {line}", flush=True)
    if options.json:
        print(json.dumps(results, indent=1))
    return DAMAGED if any(one["integrity"] == "damaged" for one in results) else 0


def chosen(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or a run's newest one, damaged or not, whose record is whole.

    Raises:
        ConfigError: there is none, or none that says what it is.
    """
    from mmtrain.checkpoint.damage import damage_of_record
    from mmtrain.checkpoint.listing import find_checkpoint

    if path.resolve().name == "checkpoints":
        path = path.resolve().parent
    return find_checkpoint("path", path, lambda line: print(f"note: {line}", file=sys.stderr), damage_of_record)


def shard_bytes(path: Path) -> int:
    """Return the bytes of a checkpoint's files of tensors."""
    from mmtrain.checkpoint.manifest import is_shard

    return sum(file.stat().st_size for file in path.iterdir() if is_shard(file.name))


def write(found: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print what was found, for a program or for a person."""
    print(json.dumps(plain(found), indent=1) if as_json else "\n".join(lines))


def plain(found: Any) -> Any:
    """Return nested data with numbers that are not finite as texts: JSON has no words for them."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, list):
        return [plain(value) for value in found]
    return str(found) if isinstance(found, float) and not math.isfinite(found) else found


def main(argv: list[str] | None = None) -> int:
    """Look into checkpoints; returns the exit code."""
    options = parse(argv)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
