"""Records, lines and heat maps of evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config.cli import compose
from mmtrain.evals.cell_score import CellScore
from mmtrain.evals.result import NeedleResult
from mmtrain.evals.sample import Cell
from mmtrain.log.metrics import read_metrics
from mmtrain.log.series import series
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.report import Report

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCORES = [
    CellScore(Cell(kind, length, depth), passed, passed, 1.5)
    for kind, passed in (("single", 100.0), ("multi", 0.0))
    for length in (64, 2048)
    for depth in (0.0, 0.5, 1.0)
]
RESULT = NeedleResult("p", SCORES, 3, {2048: 1.25}, 2.0)


def test_a_record_has_a_series_of_each_kind_and_length_and_all_cells() -> None:
    record = RESULT.record()
    assert record["needles"] == 50 and record["needles/single"] == 100 and record["needles/multi/2048"] == 0
    assert len(record["needle_cells"]) == 12
    assert record["needle_cells"][3] == {"kind": "single", "length": 2048, "depth": 0.0, "samples": 3, "passed": 100.0,
                                         "tokens": 100.0, "nats": 1.5, "repeats": 1.25}  # fmt: skip
    drawn = dict(series(record))
    assert "needle_cells" not in drawn and drawn["needles/single/64"] == 100 and drawn["needles_nats"] == 1.5


def test_a_line_says_that_text_repeats() -> None:
    said, repeats = RESULT.line().split("; ")
    assert said == ("needles 50.0% (single 100.0, multi 0.0) at 64 to 2,048 tokens, answer tokens 50.0% right, "
                    "1.500 nats, in 2.0 s")  # fmt: skip
    assert repeats == "held-out text is read 1.2 times at 2,048 tokens"


@pytest.mark.parametrize("plot", [True, False])
def test_a_report_records_prints_and_draws(tmp_path: Path, plot: bool, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(["stage=quickstart", "run.name=x", f"run.dir={tmp_path}", "data.path=none", "log.wandb=off",
                      f"log.plot={str(plot).lower()}"], CONFIGS)  # fmt: skip
    plan, told = RunPlan(scaled_phases(config.stage), 1, 1), []
    with Report(config, RunFolder(config), plan, Progress(), peak=1e12, enabled=True) as made:
        made.trackers[0].log = lambda record, step: told.append((step, record["needles"]))
        made.needles(Progress(7, 700, 0, 0, 700), RESULT)
    (record,) = read_metrics(tmp_path / "x")
    assert (record["step"], record["tokens"], record["needles"]) == (7, 700, 50.0) and told == [(7, 50.0)]
    assert f"step 7: {RESULT.line()}" in capsys.readouterr().err
    assert (tmp_path / "x" / "needles.png").exists() == plot


def test_a_heat_map_that_cannot_be_written_costs_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(
        ["stage=quickstart", "run.name=x", f"run.dir={tmp_path}", "data.path=none", "log.wandb=off"], CONFIGS
    )
    (tmp_path / "x" / "needles.png.tmp").mkdir(parents=True)
    plan = RunPlan(scaled_phases(config.stage), 1, 1)
    with Report(config, RunFolder(config), plan, Progress(), peak=1e12, enabled=True) as made:
        made.needles(Progress(7, 700, 0, 0, 700), RESULT)
    assert "needles.png cannot be written" in capsys.readouterr().err
