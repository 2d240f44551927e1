"""Nodes under test, as processes on this host: well ones pass, and each fault is named with its node."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.health.preflight.judge import Judgement, judge_folder
from mmtrain.health.preflight.node import WORKER, NodeUnderTest, gpu_faults
from tests.dist.runs import environment

FAULTY = str(Path(__file__).with_name("faulty_worker.py"))
NODES = ["a", "b", "c"]


def one(folder: Path, name: str, processes: int, fault: str | None, patience: float) -> None:
    worker = WORKER if fault is None else (FAULTY, fault)
    os.environ.update(environment())
    test = NodeUnderTest(folder, name, NODES, processes, 0, worker, seconds=5 * patience, patience=patience)
    test.run(test.facts("abc", {"torch": "2"}))


def fly(folder: Path, faults: Mapping[str, str], processes: int = 1, patience: float = 60.0) -> Judgement:
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=one, args=(folder, name, processes, faults.get(name), patience)) for name in NODES
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return judge_folder(folder, NODES, processes, 0)


@pytest.mark.slow
def test_nodes_of_several_ranks_that_are_well_are_all_good(tmp_path: Path) -> None:
    found = fly(tmp_path, {}, processes=2)
    assert found.good == NODES, found.faults
    assert [line.partition(":")[0] for line in found.lines] == [
        "matrix", "copy", "all_reduce", "all_to_all", "all_reduce between nodes", "all_to_all between nodes"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("matrix", "rank 0: matrix 1e-12 TFLOP/s, the median is"),
        pytest.param("copy", "rank 0: copy 1e-12 GB/s, the median is", marks=pytest.mark.slow),
        pytest.param("all_reduce", "the network to a, c is slow", marks=pytest.mark.slow),
        pytest.param("all_to_all", "the network to a, c is slow", marks=pytest.mark.slow),
        pytest.param("invisible", "rank 0: RuntimeError: GPU 0 is not visible", marks=pytest.mark.slow),
        pytest.param("dies", "rank 0 left no report: it hangs or died", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_named_with_its_node_alone(tmp_path: Path, fault: str, named: str) -> None:
    found = fly(tmp_path, {"b": fault}, patience=15.0 if fault in ("dies", "invisible") else 60.0)
    assert found.good == ["a", "c"], found.faults
    assert any(line.startswith(named) for line in found.faults["b"]), found.faults


@pytest.mark.slow
def test_a_node_that_hangs_costs_no_more_than_the_time(tmp_path: Path) -> None:
    found = fly(tmp_path, {"b": "hangs"}, patience=15.0)
    assert found.good == ["a", "c"], found.faults
    assert found.faults["b"] == ["rank 0 left no report: it hangs or died"]


def test_a_folder_that_is_not_shared_is_seen(tmp_path: Path) -> None:
    for name, folder in (("a", tmp_path / "shared"), ("b", tmp_path / "own")):
        test = NodeUnderTest(folder, name, ["a", "b"], 0, 0, patience=0.2)
        assert test.run(test.facts("abc", {})) == 0
    found = judge_folder(tmp_path / "shared", ["a", "b"], 0, 0)
    assert found.good == ["a"] and "does not see the shared folder" in found.faults["b"][0]
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(OSError, match="File exists"):
        replace(test, folder=blocked).run(test.facts("abc", {}))


def test_answers_of_nvidia_smi_are_judged() -> None:
    answers = {
        "ecc.errors.uncorrected.volatile.total": ["0", "3", "[N/A]"],
        "clocks_event_reasons.hw_thermal_slowdown": ["Active", "Not Active", "Not Active"],
    }
    assert gpu_faults(lambda query: answers.get(query, [])) == [
        "GPU 1: ecc.errors.uncorrected.volatile.total is 3",
        "GPU 0: clocks_event_reasons.hw_thermal_slowdown is Active",
    ]
