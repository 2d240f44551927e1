"""Results of launch/eval.py in a run's folder: what the page holds of them, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtrain.evals.offline.request import EvalRequest
from mmtrain.evals.offline.summary import summarise
from mmtrain.evals.offline.write import name_of, write_results
from mmtrain.report.evaluations import MOST, read_evaluations
from mmtrain.report.payload import run_payload
from mmtrain.report.read_run import read_run
from tests.report.made import NASTY, make_run


def write_evaluation(run: Path, step: int | None = 60, seed: int = 0, task: str = "needle") -> Path:
    """Results as launch/eval.py writes them, of records that are made; returns the JSON."""
    common = {"tokens": 1, "hash": "0" * 64, "key": "k", "seconds": 1.0}
    records: list[dict[str, Any]] = [
        {**common, "task": name, "length": length, "depth": depth, "index": i, "score": 100.0 * (i % 2)}
        for name in (task, "vt") for length in (4096, 32768) for i, depth in enumerate((0.0, 0.5, 1.0))
    ]  # fmt: skip
    records += [{**common, "task": "perplexity", "length": 8, "depth": None, "index": 0, "loss": 2.0,
                 "one_document": True, "bucket_nats": [2.0, 4.0, 2.0, 6.0]}]  # fmt: skip
    records += [{**common, "task": "longbench_v2", "length": None, "depth": None, "index": i, "acc": i == 0,
                 "acc_norm": False, "log_acc_norm2": -1.0, "groups": ["easy"], "chance": 25.0, "score": 0.0}
                for i in range(2)]  # fmt: skip
    records += [{**common, "task": "mtob_ek", "length": None, "depth": None, "index": 0, "answer": "ab",
                 "expected": ["ab"], "score": 100.0}]  # fmt: skip
    identity = {"path": str(run / "step-00000060"), "step": step, "sha256": "a", "rope_base": 1e4, "tokenizer_vocab": 7}
    result = {"checkpoint": identity, "request": {}, "began": "2026-01-05", **summarise(records), "samples": records}
    (run / "evals").mkdir(exist_ok=True)
    name = name_of(EvalRequest(("needle",), (4096,), seed=seed), identity, {})
    return write_results(run / "evals", name, result)[0]


def test_the_page_holds_what_was_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    path = write_evaluation(run)
    (one,) = run_payload(read_run(run))["evaluations"]
    assert (one["name"], one["step"], one["began"]) == (path.stem, 60, "2026-01-05")
    assert [row[:2] for row in one["rows"]] == [["needle", 4096], ["needle", 32768], ["vt", 4096], ["vt", 32768]]
    assert one["rows"][0][2:] == [pytest.approx(100 / 3), 3]
    assert one["cells"][1] == ["needle", 4096, 0.5, 100.0, 1.0] and len(one["cells"]) == 12
    (losses,) = one["perplexity"]
    assert losses["buckets"] == [[1, 1, 2.0], [2, 3, 2.0], [4, 4, 2.0], [5, 7, 2.0]]
    assert one["files"] == [["longbench_v2", 2, 50.0, 0.0, -1.0, None, 0],
                            ["longbench_v2, easy", 2, 50.0, 0.0, -1.0, None, 0],
                            ["mtob_ek", 1, None, None, None, 100.0, 0]]  # fmt: skip


def test_results_come_by_step_and_are_not_too_many(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    for i in range(MOST + 3):
        write_evaluation(run, step=MOST + 3 - i, seed=i)
    found, damaged = read_evaluations(run)
    assert [one["step"] for one in found] == list(range(4, MOST + 4)) and not damaged


def test_files_that_are_no_results_are_told_and_others_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    path = write_evaluation(run)
    folder = path.parent
    (folder / "cut.json").write_text(path.read_text()[:300])
    (folder / "odd.json").write_text(json.dumps({**json.loads(path.read_text()), "scores": [{"task": "x"}]}))
    (folder / "list.json").write_text("[1]")
    (folder / "other.json").write_text('{"format": "theirs"}')
    data = read_run(run)
    assert len(data.evaluations) == 1
    assert {name for name in data.damaged if name.startswith("evals/")} == {
        "evals/cut.json", "evals/odd.json", "evals/list.json"
    }  # fmt: skip
    assert not read_evaluations(make_run(tmp_path / "none"))[0]


def test_names_of_tasks_stay_texts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    write_evaluation(run, task=NASTY)
    assert run_payload(read_run(run))["evaluations"][0]["rows"][0][0] == NASTY
