"""What a step's record holds: where the run stands, speeds of real tokens, drops without the global router."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.log.metrics import read_metrics
from mmtrain.train import report
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.report import Report
from mmtrain.train.statistics import StepResult

CONFIGS = Path(__file__).parents[2] / "configs"
RESULT = StepResult(loss=5.0, aux_loss=0.01, grad_norm=1.0, flops=1e9, router_load=[[0.5, 1.5], [1.0, 1.0]],
                    drop_rate=[0.0, 0.25], drop_rate_alone=[0.25, 0.5], router_entropy=[0.6, 0.7],
                    tokens=8192)  # fmt: skip
AT = Progress(20, 20 * 8192, 0, 320, 20 * 8192)  # of quickstart, where its warm-up ends
TRACKER = SimpleNamespace(log=lambda record, step: None, finish=lambda: None)
ALONE = {"drop_rate_alone": 0.375, "drop_rate_alone_per_layer": [0.25, 0.5]}


@pytest.mark.parametrize("pooled", [False, True])
def test_drops_without_the_global_router_stand_beside_those_with_it(
    tmp_path: Path, pooled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(["stage=quickstart", "run.name=x", f"run.dir={tmp_path}", "data.path=none", "log.wandb=off",
                      "run.max_steps=1", "parallel.ep=2", f"parallel.global_router={pooled}"], CONFIGS)  # fmt: skip
    plan = RunPlan(scaled_phases(config.stage), 2, 1)
    with Report(config, RunFolder(config), plan, Progress(), peak=1e12, enabled=True) as made:
        step = plan.next(Progress())
        assert step is not None
        made.step(step, step.after(RESULT.tokens), plan.phases[0].phase, RESULT, 1.0)
    record = read_metrics(tmp_path / "x")[0]
    assert record["drop_rate"] == 0.125 and record["drop_rate_per_layer"] == [0.0, 0.25]
    assert {key: value for key, value in record.items() if "alone" in key} == (ALONE if pooled else {})
    assert ("drop 12.5%  alone 37.5%" if pooled else "drop 12.5%\n") in capsys.readouterr().err


def options(folder: Path, *overrides: str) -> PretrainConfig:
    given = ["stage=quickstart", "run.name=x", f"run.dir={folder}", "data.path=none", "log.wandb=off", "log.plot=false"]
    return compose([*given, *overrides], CONFIGS)


def reported(config: PretrainConfig, at: Progress, *results: StepResult) -> tuple[list[dict], list[str]]:
    """Records and console of steps of two seconds each, from a position on."""
    plan, err = RunPlan(scaled_phases(config.stage), 2, 1), []
    with Report(config, RunFolder(config), plan, at, peak=1e10, enabled=True) as made:
        made.console.note = err.append
        for result in results:
            step = plan.next(at)
            assert step is not None
            at = step.after(result.tokens)
            made.step(step, at, plan.phases[0].phase, result, 2.0)
    return read_metrics(config.run.dir + "/x"), err


def test_a_record_says_where_the_run_stands_after_its_step_and_counts_no_padding(tmp_path: Path) -> None:
    records, said = reported(options(tmp_path, "run.max_steps=22"), AT, replace(RESULT, tokens=6000), RESULT)
    first, second = records
    assert (first["step"], first["tokens"], first["first_row"], first["rows"]) == (21, 169_840, 320, 16)
    assert (second["step"], second["tokens"], second["first_row"]) == (22, 178_032, 336)
    assert (first["tokens_per_s"], first["mfu"], first["step_s"]) == (3000.0, 0.05, 2.0)
    assert first["lr"] == pytest.approx(2e-3 * 0.1**0.01) and first["seq_len"] == 512 and "skipped" not in first
    assert said[-1].startswith("step 22/22") and "left 0s" in said[-1].replace("  ", " ")


def test_a_skipped_step_is_told_with_its_rows(tmp_path: Path) -> None:
    records, said = reported(options(tmp_path), AT, replace(RESULT, loss=float("nan"), skipped=True))
    assert records[0]["skipped"] is True and records[0]["loss"] is None
    assert "step 21 skipped" in said[-1] and "rows 320 to 335 of phase quickstart" in said[-1]


def test_a_launch_that_goes_on_drops_the_records_of_what_it_does_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(report, "TensorBoardTracker", lambda log, run, step: begun.append(step) or TRACKER)
    reported(options(tmp_path), AT, RESULT, RESULT, RESULT)
    again = replace(AT, step=22, row=352)
    assert [record["step"] for record in reported(options(tmp_path), again, RESULT)[0]] == [21, 22, 23]
    assert begun == [20, 22]  # TensorBoard hides as much
