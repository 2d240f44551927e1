"""The judgement of nodes from their reports: one planted fault for each check, named with its node."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmtrain.health.preflight.judge import Judgement, judge
from mmtrain.health.preflight.pairs import MAX_ROUNDS, pair_rounds
from mmtrain.health.preflight.reports import NodeFacts, RankReport

NODES = [f"n{i}" for i in range(5)]
GPUS = 2


class Reports:
    """Those of five nodes of two GPUs that are well."""

    def __init__(self) -> None:
        self.facts = {node: NodeFacts(node, node, [1], GPUS, "abc", {"torch": "2.11"}) for node in NODES}
        self.seen = {node: list(NODES) for node in NODES}
        rates = {"matrix": 700.0, "copy": 4000.0, "all_reduce": 300.0, "all_to_all": 280.0}
        way = {"all_reduce": 45.0, "all_to_all": 40.0}
        self.ranks = {
            (node, i): RankReport(node, i, dict(rates), {o: dict(way) for o in NODES if o != node}, [], True)
            for node in NODES
            for i in range(GPUS)
        }

    def judge(self) -> Judgement:
        return judge(NODES, self.facts, self.seen, self.ranks.values(), GPUS, GPUS)

    def lose_way(self, node: str, other: str, rate: float | None) -> None:
        for one, two in ((node, other), (other, node)):
            for i in range(GPUS):
                self.ranks[one, i].pairs[two] = None if rate is None else {"all_reduce": rate, "all_to_all": rate}


def replaced(reports: Reports, **what: object) -> None:
    reports.facts["n3"] = NodeFacts(**{**vars(reports.facts["n3"]), **what})


FAULTS: list[tuple[str, Callable[[Reports], object]]] = [
    ("left no report: it did not start", lambda r: (r.facts.pop("n3"), r.ranks.pop(("n3", 0)), r.ranks.pop(("n3", 1)))),
    ("GPU 1 left no report", lambda r: r.ranks.pop(("n3", 1))),
    ("GPU 1: CUDA error", lambda r: r.ranks["n3", 1].errors.append("CUDA error")),
    ("GPU 1: matrix 600 TFLOP/s, the median is 700", lambda r: r.ranks["n3", 1].rates.update(matrix=600.0)),
    ("GPU 0: copy 3000 GB/s", lambda r: r.ranks["n3", 0].rates.update(copy=3000.0)),
    ("GPU 0: all_reduce 100 GB/s", lambda r: r.ranks["n3", 0].rates.update(all_reduce=100.0)),
    ("GPU 0: all_to_all 100 GB/s", lambda r: r.ranks["n3", 0].rates.update(all_to_all=100.0)),
    ("commit abd, the others abc", lambda r: replaced(r, commit="abd")),
    ("torch 2.13, the others 2.11", lambda r: replaced(r, versions={"torch": "2.13"})),
    ("1 of 2 GPUs are visible", lambda r: replaced(r, gpus=1)),
    ("GPU 1: ecc is 3", lambda r: replaced(r, faults=["GPU 1: ecc is 3"])),
    ("does not see the files of n0", lambda r: r.seen.update(n3=["n3"])),
    ("the network to n0, n1, n2, n4 is slow", lambda r: [r.lose_way("n3", o, 5.0) for o in NODES if o != "n3"]),
    ("the network to n0, n1, n2, n4 fails", lambda r: [r.lose_way("n3", o, None) for o in NODES if o != "n3"]),
]


def test_nodes_that_are_well_are_good() -> None:
    found = Reports().judge()
    assert found.good == NODES and not found.faults
    assert "matrix: median 700 TFLOP/s, least 700" in found.lines


@pytest.mark.parametrize(("named", "plant"), FAULTS, ids=[name[:30] for name, _ in FAULTS])
def test_each_fault_is_named(named: str, plant: Callable[[Reports], object]) -> None:
    reports = Reports()
    plant(reports)
    found = reports.judge()
    assert list(found.faults) == ["n3"] and found.good == ["n0", "n1", "n2", "n4"]
    assert any(line.startswith(named) for line in found.faults["n3"]), found.faults


def test_one_bad_way_blames_one_of_its_ends_and_says_so() -> None:
    reports = Reports()
    reports.lose_way("n1", "n4", None)
    assert reports.judge().faults == {"n4": ["the network to n1 fails; either of the two may be at fault"]}


def test_ways_to_a_node_that_is_out_blame_nobody_else() -> None:
    reports = Reports()
    reports.ranks["n3", 0].errors.append("CUDA error")
    for other in ("n0", "n1"):
        reports.lose_way("n3", other, None)
    assert list(reports.judge().faults) == ["n3"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_rounds_bring_each_pair_together_once(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    met = [frozenset(pair) for partners in pair_rounds(nodes) for pair in partners.items()]
    assert len(set(met)) == len(met) // 2 == count * (count - 1) // 2
    for partners in pair_rounds(nodes):
        assert all(partners[partners[node]] == node != partners[node] for node in partners)


def test_many_nodes_meet_as_many_others_as_time_allows() -> None:
    nodes = [f"n{i}" for i in range(100)]
    rounds = pair_rounds(nodes)
    assert len(rounds) == MAX_ROUNDS and all(len(partners) == 100 for partners in rounds)
