"""Judgement of a job's nodes from what they left in the shared folder: which are good, and what is wrong with others.

Rates are compared with the median of all: what nodes of one kind should do needs no table.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmtrain.health.preflight.reports import NodeFacts, RankReport, read_facts, read_ranks, read_seen

UNITS = {"matrix": "TFLOP/s"}
# Of the median, below which a rate is a fault. GPUs of one kind differ by a few percent; cores of a CPU are shared.
LEAST = {"cuda": {"matrix": 0.9, "copy": 0.9}, "cpu": {}}
LEAST_ELSE = {"cuda": 0.75, "cpu": 0.02}


@dataclass
class Judgement:
    """What was found.

    Attributes:
        nodes: of the job, in its order.
        faults: by node, a line each; nodes without are good.
        lines: figures.
    """

    nodes: Sequence[str]
    faults: dict[str, list[str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def good(self) -> list[str]:
        """Nodes without a fault, in the job's order."""
        return [node for node in self.nodes if not self.faults.get(node)]

    def blame(self, node: str, fault: str) -> None:
        """Note a fault of a node."""
        self.faults.setdefault(node, []).append(fault)


def judge_folder(folder: Path, nodes: Sequence[str], processes: int, gpus: int) -> Judgement:
    """Judge what the nodes left in a folder; see :func:`judge`."""
    return judge(nodes, read_facts(folder), read_seen(folder), read_ranks(folder), processes, gpus)


def judge(
    nodes: Sequence[str],
    facts: Mapping[str, NodeFacts],
    seen: Mapping[str, Sequence[str]],
    ranks: Iterable[RankReport],
    processes: int,
    gpus: int,
) -> Judgement:
    """Judge all nodes.

    Args:
        nodes: of the job, in its order.
        facts: by node.
        seen: by node, the nodes whose facts it saw in the folder.
        ranks: of all nodes.
        processes: ranks of a node.
        gpus: GPUs that a node should have.
    """
    found = Judgement(nodes)
    kind = "cuda" if gpus else "cpu"
    for node in nodes:
        if node not in facts:
            found.blame(node, "left no report: it did not start, or does not see the shared folder, or cannot write it")
    _judge_facts(found, facts, seen, gpus)
    reports = [rank for rank in ranks if rank.node in facts]
    for node in facts:
        own = {rank.local_rank: rank for rank in reports if rank.node == node}
        for local in range(processes):
            if local not in own or (not own[local].rates and not own[local].errors):
                found.blame(node, f"{_device(kind, local)} left no report: it hangs or died")
        for rank in own.values():
            for error in (line for line in rank.errors if not line.startswith("with ")):
                found.blame(node, f"{_device(kind, rank.local_rank)}: {error}")
    _judge_rates(found, reports, kind)
    _judge_pairs(found, reports, kind)
    return found


def _judge_facts(
    found: Judgement, facts: Mapping[str, NodeFacts], seen: Mapping[str, Sequence[str]], gpus: int
) -> None:
    """Blame nodes whose checkout, packages, GPUs or view of the folder differ from the others'."""
    said = {node: {"commit": one.commit, **one.versions} for node, one in facts.items()}
    for name in sorted({name for values in said.values() for name in values}):
        usual = Counter(values.get(name, "missing") for values in said.values()).most_common(1)[0][0]
        for node, values in said.items():
            if values.get(name, "missing") != usual:
                found.blame(node, f"{name} {values.get(name, 'missing')}, the others {usual}")
    for node, one in facts.items():
        if one.gpus < gpus:
            found.blame(node, f"{one.gpus} of {gpus} GPUs are visible")
        for fault in one.faults:
            found.blame(node, fault)
        missed = [other for other in facts if node in seen and other not in seen[node]]
        if missed and 2 * len(missed) >= len(facts) - 1:
            found.blame(node, f"does not see the files of {', '.join(missed[:4])} in the shared folder")


def _judge_rates(found: Judgement, reports: Sequence[RankReport], kind: str) -> None:
    """Blame the nodes of ranks whose own rates, or rates within their node, are far below the median."""
    for name in dict.fromkeys(name for rank in reports for name in rank.rates):
        rates = {(rank.node, rank.local_rank): rank.rates[name] for rank in reports if name in rank.rates}
        middle, least = statistics.median(rates.values()), LEAST[kind].get(name, LEAST_ELSE[kind])
        unit = UNITS.get(name, "GB/s")
        found.lines.append(f"{name}: median {middle:.4g} {unit}, least {min(rates.values()):.4g}")
        for (node, local), rate in rates.items():
            if rate < least * middle:
                found.blame(node, f"{_device(kind, local)}: {name} {rate:.4g} {unit}, the median is {middle:.4g}")


def _judge_pairs(found: Judgement, reports: Sequence[RankReport], kind: str) -> None:
    """Blame the nodes that most of the bad ways between nodes lead to, one after another until no bad way is left."""
    ways: dict[frozenset[str], dict[str, float]] = {}
    failed: set[frozenset[str]] = set()
    for rank in reports:
        for other, rates in rank.pairs.items():
            way = frozenset((rank.node, other))
            if rates is None:
                failed.add(way)
            else:
                known = ways.setdefault(way, {})
                known |= {name: min(rate, known.get(name, rate)) for name, rate in rates.items()}
    middles = _usual(ways)
    for name, middle in sorted(middles.items()):
        found.lines.append(f"{name} between nodes: usually {middle:.4g} GB/s, {len(ways)} pairs")
    slow = {way for way, rates in ways.items()
            if any(rate < LEAST_ELSE[kind] * middles[name] for name, rate in rates.items())}  # fmt: skip
    gone = {node for node in found.nodes if found.faults.get(node)}
    bad = {way for way in failed | slow if not way & gone}  # others are explained already
    while bad:
        counts = Counter(node for way in bad for node in way)
        node = max(counts, key=lambda one: (counts[one], found.nodes.index(one)))
        mine = [way for way in bad if node in way]
        others = sorted(next(iter(way - {node})) for way in mine)
        what = "fails" if any(way in failed for way in mine) else "is slow"
        doubt = "" if counts[node] > 1 else "; either of the two may be at fault"
        found.blame(node, f"the network to {', '.join(others)} {what}{doubt}")
        bad -= set(mine)


def _usual(ways: Mapping[frozenset[str], Mapping[str, float]]) -> dict[str, float]:
    """Return the median over nodes of each one's best way: of three nodes a bad one slows two ways of three."""
    best: dict[str, dict[str, float]] = {}
    for way, rates in ways.items():
        for name, rate in rates.items():
            for node in way:
                of_nodes = best.setdefault(name, {})
                of_nodes[node] = max(rate, of_nodes.get(node, rate))
    return {name: statistics.median(of_nodes.values()) for name, of_nodes in best.items()}


def _device(kind: str, local: int) -> str:
    return f"GPU {local}" if kind == "cuda" else f"rank {local}"
