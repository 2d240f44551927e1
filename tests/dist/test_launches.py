"""What a run records of its launches and of its ranks' pace: there, small, and without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import report
from mmtrain.log.metrics import read_metrics
from tests.dist.runs import SMALL, make_corpus, pretrain


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks: `with` compares their pace after every step, and is launched twice; `without` never does."""
    folder = tmp_path_factory.mktemp("launches")
    options = [*SMALL, f"data.path={make_corpus(folder)}", f"run.dir={folder}/runs", "run.resume=auto", "parallel.cp=1"]
    for name, interval, steps in (("with", 1, 2), ("with", 1, 4), ("without", 0, 4)):
        pretrain(*options, f"run.name={name}", f"guard.pace_interval={interval}", f"run.max_steps={steps}", processes=2)
    return folder / "runs"


def test_each_launch_is_on_record_with_what_it_ran_on(runs: Path) -> None:
    begun, ended, again, end = read_metrics(runs / "with/launches.jsonl")
    assert (begun["event"], begun["step"], begun["last_step"]) == ("began", 0, 2)
    assert (ended["event"], ended["step"], ended["why"]) == ("ended", 2, None)
    assert (again["step"], again["last_step"], end["step"]) == (2, 4, 4)
    assert again["origin"].startswith("resumed from") and begun["origin"] == "initial weights"
    assert begun["processes"] == 2 and begun["device"].startswith("CPU") and begun["precision"] == "float32"
    assert begun["parameters"] > begun["activated"] > 0 and begun["torch"] and begun["host"]
    commit = begun["commit"]
    assert commit is None or (len(commit) == 40 and int(commit, 16))


def test_the_pace_of_ranks_is_recorded_and_training_does_not_see_it(runs: Path) -> None:
    paces = [record for record in read_metrics(runs / "with") if "pace_product_s" in record]
    assert [record["step"] for record in paces] == [1, 2, 3, 4]
    for record in paces:
        least, median, most, rank = record["pace_product_s"]
        assert 0 < least <= median <= most and rank in (0, 1) and len(record["pace_rows_s"]) == 4
    assert not any("pace_product_s" in record for record in read_metrics(runs / "without"))
    with_it, without = (
        [(one["loss"], one["grad_norm"]) for one in read_metrics(runs / name) if "loss" in one]
        for name in ("with", "without")
    )
    assert with_it == without and len(with_it) == 4


def test_a_real_run_s_page_shows_both(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert report.main([str(runs / "with"), str(runs / "without"), "--out", str(out)]) == 0
    text = out.read_text()
    data = json.loads(text.split('id="data">', 1)[1].split("</script", 1)[0])
    first, second = data["runs"]
    assert [one["text"] for one in first["troubles"]] == ["1 restart, after step 2"] and second["troubles"] == []
    assert first["about"]["processes"] == 2
    assert "pace_rows_s/most" in first["points"] and "pace_rows_s/most" not in second["points"]
    assert [row["step"] for row in first["checkpoints"]] == [2, 4] and all(
        row["damage"] is None for row in first["checkpoints"]
    )
    assert first["experts"]["shape"] == [4, 2, 4]
