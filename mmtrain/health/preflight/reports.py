"""Files that nodes leave in the shared folder: what each found of itself, and what its ranks measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class NodeFacts:
    """What one node says of itself before it measures.

    Attributes:
        node: its name in the job.
        address: where others reach it.
        ports: free ones there, one for each round of pairs.
        gpus: how many it sees.
        commit: of the checkout.
        versions: of packages.
        faults: what its GPUs say of themselves, a line each: errors of memory, throttling.
    """

    node: str
    address: str
    ports: list[int]
    gpus: int
    commit: str
    versions: dict[str, str]
    faults: list[str] = field(default_factory=list)


@dataclass
class RankReport:
    """What one rank of a node measured, as far as it came.

    Attributes:
        node: its name.
        local_rank: of the rank on its node, and of its GPU.
        rates: by measurement: matrix (TFLOP/s), copy, host_copy, all_reduce, all_to_all (GB/s, within the node).
        pairs: by the other node: GB/s of all_reduce and all_to_all with all its ranks; None where it failed.
        errors: a line each.
        done: whether it came to its end.
    """

    node: str
    local_rank: int
    rates: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, dict[str, float] | None] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    done: bool = False


def write(folder: Path, name: str, content: object) -> None:
    """Write a report, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{name}.{os.getpid()}"
    scratch.write_text(json.dumps(asdict(content)), encoding="utf-8")  # type: ignore[call-overload]
    os.replace(scratch, folder / name)


def read_facts(folder: Path) -> dict[str, NodeFacts]:
    """Return the facts of all nodes that have left theirs."""
    found = (NodeFacts(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.facts")))
    return {one.node: one for one in found}


def read_seen(folder: Path) -> dict[str, list[str]]:
    """Return, by node, the nodes whose facts it saw."""
    return {path.stem: path.read_text(encoding="utf-8").split() for path in sorted(folder.glob("*.seen"))}


def read_ranks(folder: Path) -> list[RankReport]:
    """Return the reports of all ranks."""
    return [RankReport(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.rank"))]
