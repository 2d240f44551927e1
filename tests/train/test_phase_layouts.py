"""Layouts of phases: what each phase's is, what is refused, and what a session leaves behind."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmtrain.config import ParallelConfig, PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.parallel import mesh
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.phase_layouts import PhaseLayout, changes, plan_phase_layouts
from mmtrain.train.plan_run import plan_run
from mmtrain.train.session import Session

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["model=tiny", "model.num_layers=2", "model.layer_pattern=LS", "model.vocab_size=300"]


def config(*overrides: str) -> PretrainConfig:
    given = ["stage=long_ctx", "stage.scale=1/128", "data.path=x", "run.name=y", "optim.precision=fp32", *TINY]
    return compose([*given, *overrides], CONFIGS)


def layouts(world: int, *overrides: str) -> list[PhaseLayout]:
    made = config(*overrides)
    return plan_phase_layouts(world, made.parallel, made.model, scaled_phases(made.stage))


def test_a_phase_has_its_own_options_over_the_run_s() -> None:
    found = layouts(4, "parallel.tp=2", "stage.phases.1.parallel={cp: 2}", "stage.phases.2.parallel={cp: 4, tp: 1}")
    assert [(one.layout.dp, one.layout.cp, one.layout.tp) for one in found] == [(2, 1, 2), (1, 2, 2), (1, 4, 1)]
    assert found[0].parallel == replace(config("parallel.tp=2").parallel, cp=1)
    assert [one.row_unit for one in found] == [2, 16, 32]


def test_what_cannot_work_is_told_of_all_phases_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        layouts(4, "stage.phases.1.parallel={cp: 3}", "stage.phases.2.parallel={tp: 5}")
    text = str(caught.value)
    assert text.startswith("stage.phases[1].parallel.cp=3: 4 processes = pp 1 x dp ? x cp 3 x tp 1")
    assert "; and stage.phases[2].parallel.tp=5: 4 processes" in text and "\n" not in text
    assert "give stage.phases[1].parallel.cp=" in caught.value.fix


def test_batches_that_layouts_cannot_run_are_told_of_all_phases_at_once() -> None:
    """By rows that processes cannot share out, and by rows that are too few for a pipeline."""

    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            plan_run(config(*overrides), 2, torch.device("cpu"))
        return str(caught.value)

    odd = refused("parallel.cp=1", "parallel.micro_batch_rows=3")
    assert odd.startswith("stage.phases[0].batch[0].tokens=262144: 256 rows of 1024 tokens are not a multiple of 6 ")
    assert "; and stage.phases[1].batch[0].tokens=262144: 64 rows" in odd
    assert "; and stage.phases[2].batch[0].tokens=262144: 32 rows" in odd
    assert odd.endswith("; all phases run with stage.batch_scale=15/16 or stage.batch_scale=9/8")
    for scale in ("15/16", "9/8"):
        plan = plan_run(config("parallel.cp=1", "parallel.micro_batch_rows=3", f"stage.batch_scale={scale}"), 2,
                        torch.device("cpu")).plan  # fmt: skip
        assert all(rows % 6 == 0 for phase in plan.phases for rows in phase.rows)
    few = refused("parallel.pp=2", "stage.batch_scale=1/64")
    assert few.startswith("stage.phases[1].batch=4096: 1 micro-batches a rank do not fill a pipeline")
    assert "; and stage.phases[2].batch=8192: 1 micro-batches" in few and "\n" not in odd + few


def test_the_run_s_own_option_is_named_once_for_all_phases() -> None:
    with pytest.raises(ConfigError) as caught:
        layouts(4, "parallel.tp=3")
    assert caught.value.option == "parallel.tp" and "; and " not in str(caught.value)


def test_cp_that_does_not_cut_a_row_evenly_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"seq_len 1024 = 1024 tokens / \(cp 2 x cp_chunks 5 = 10 chunks\)"):
        layouts(2, "stage.phases.0.parallel={cp: 2, cp_chunks: 5}")


def test_changes_name_every_option_that_differs() -> None:
    assert (
        changes(ParallelConfig(cp=1), ParallelConfig(cp=2, global_router=True))
        == "cp 1 -> 2, global_router false -> true"
    )


def test_a_session_that_is_closed_leaves_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("stage.phases.1.parallel={activation_checkpoint: true}")
    plan = RunPlan.laid_out(scaled_phases(made.stage), plan_phase_layouts(1, made.parallel, made.model,
                                                                          scaled_phases(made.stage)))  # fmt: skip
    context = mesh.start(made.cluster, plan.phases[0].laid.layout)
    try:
        session = Session(made, context, plan, 0, SimpleNamespace())
        held = [weakref.ref(parameter) for parameter in session.model.module.parameters()]
        assert all(ref() is not None for ref in held)
        session.close()
        gc.collect()
        assert [ref for ref in held if ref() is not None] == []
        again = Session(made, context, plan, 1, SimpleNamespace())
        assert all(block.recompute for block in again.model.module.layers)
        assert torch.isfinite(next(again.model.module.parameters()).to_local()).all()
        again.close()
    finally:
        mesh.stop()
