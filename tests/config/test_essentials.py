"""What no run can do without is asked for at once, with a line that works when it is copied."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mmtrain.config import cli, essentials, machine
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import plan_layout
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.stage_warnings import stage_warnings

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def told(monkeypatch, tmp_path):
    """The refusal of a command line in an empty folder, on a machine with so many GPUs."""

    def call(*arguments: str, gpus: int = 0, program: str = "launch/pretrain.py") -> ConfigError:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(essentials, "gpu_count", lambda: gpus)
        monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
        monkeypatch.setattr(cli.sys, "argv", [program])
        with pytest.raises(ConfigError) as caught:
            compose(list(arguments), CONFIGS)
        assert "\n" not in str(caught.value)
        return caught.value

    return call


def test_all_that_is_missing_is_named_at_once(told) -> None:
    error = told("stage=long_ctx")
    assert str(error).startswith("data.path and run.name=(missing): both are required; for example torchrun ")
    assert "(python launch/prepare.py --input TEXTS/ --output corpora/mine makes the corpus)" in error.fix
    assert told("data.path=b").option == "run.name" and "prepare.py" not in told("data.path=b").fix
    assert told("run.name=a").option == told("run.name=a", "data.path=null").option == "data.path"
    assert told("data.sources=[{path: a}]").option == "run.name"


@pytest.mark.parametrize("gpus", [0, 3, 8])
@pytest.mark.parametrize("stage", ["long_ctx", "pretrain", "quickstart"])
def test_the_line_to_copy_plans_and_warns_of_nothing(told, stage: str, gpus: int) -> None:
    line = told(f"+stage={stage}", "run.seed=5", gpus=gpus).fix.removeprefix("for example ").partition(" (python")[0]
    torchrun, option, processes, program, *overrides = shlex.split(line)
    assert (torchrun, option, program) == ("torchrun", "--nproc-per-node", "launch/pretrain.py")
    assert int(processes) == {0: 2, 1: 1, 3: 2, 8: 8}[gpus] and "run.seed=5" in overrides
    config = compose(overrides, CONFIGS)
    phases = scaled_phases(config.stage)
    layout = plan_layout(int(processes), config.parallel, config.model, [phase.seq_len for phase in phases])
    plan = RunPlan(phases, layout.dp, 1)
    assert 60 <= plan.left()[0] <= 240 and max(phase.seq_len for phase in phases) <= (8192 if gpus else 512)
    assert stage_warnings(config, phases) == []


def test_what_was_given_stays_and_is_quoted(told) -> None:
    fix = told("run.name=my run", "stage.scale=1/2", "model=proxy_100m", "stage.phases[0].name=1_0").fix
    assert "'run.name=my run'" in fix and "model=proxy_100m" in fix and "token_scale" not in fix
    assert "stage.phases.0.name=1_0" in fix


def test_a_prepared_corpus_is_taken_and_the_program_is_the_one_that_was_called(told, tmp_path) -> None:
    (tmp_path / "corpora/old").mkdir(parents=True)
    (tmp_path / "corpora/old/manifest.json").touch()
    fix = told("stage=quickstart", program="mmtrain pretrain").fix
    assert fix == ("for example torchrun --nproc-per-node 2 -m mmtrain pretrain +stage=quickstart "
                   "data.path=corpora/old run.name=quickstart")  # fmt: skip


def test_a_job_is_not_started_by_torchrun_nor_cut_down_to_this_machine(told) -> None:
    fix = told("stage=pretrain", "data.path=b", program="launch/submit.py").fix
    assert fix == "for example python launch/submit.py +stage=pretrain data.path=b run.name=pretrain"
    assert told("data.path=b", program="mmtrain submit").fix.startswith("for example python -m mmtrain submit ")


def test_gpus_without_torch(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for visible, count in (("", 0), ("-1", 0), ("0", 1), ("0,1,2", 3), ("1,-1,2", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.gpu_count() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert machine.gpu_count() == 0
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: X (UUID: a)'\necho '  MIG 1g'\necho 'GPU 1: X'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.gpu_count() == 2
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n")
    assert machine.gpu_count() == 0
