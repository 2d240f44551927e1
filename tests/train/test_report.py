"""What a step's record holds: drops without the global router only where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config.cli import compose
from mmtrain.log.metrics import read_metrics
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.report import Report
from mmtrain.train.statistics import StepResult

CONFIGS = Path(__file__).parents[2] / "configs"
RESULT = StepResult(loss=5.0, aux_loss=0.01, grad_norm=1.0, flops=1e9, router_load=[[0.5, 1.5], [1.0, 1.0]],
                    drop_rate=[0.0, 0.25], drop_rate_alone=[0.25, 0.5], router_entropy=[0.6, 0.7],
                    tokens=8192)  # fmt: skip
ALONE = {"drop_rate_alone": 0.375, "drop_rate_alone_per_layer": [0.25, 0.5]}


@pytest.mark.parametrize("pooled", [False, True])
def test_drops_without_the_global_router_stand_beside_those_with_it(
    tmp_path: Path, pooled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(["stage=quickstart", "run.name=x", f"run.dir={tmp_path}", "data.path=none", "log.wandb=off",
                      "run.max_steps=1", "parallel.ep=2", f"parallel.global_router={pooled}"], CONFIGS)  # fmt: skip
    plan = RunPlan(scaled_phases(config.stage), 2, 1)
    with Report(config, RunFolder(config), plan, Progress(), peak=1e12, enabled=True) as report:
        step = plan.next(Progress())
        assert step is not None
        report.step(step, step.after(RESULT.tokens), plan.phases[0].phase, RESULT, 1.0)
    record = read_metrics(tmp_path / "x")[0]
    assert record["drop_rate"] == 0.125 and record["drop_rate_per_layer"] == [0.0, 0.25]
    assert {key: value for key, value in record.items() if "alone" in key} == (ALONE if pooled else {})
    assert ("drop 12.5%  alone 37.5%" if pooled else "drop 12.5%\n") in capsys.readouterr().err
