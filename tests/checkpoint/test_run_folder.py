"""Run folders: which checkpoint a launch goes on from, and what becomes of what it does not go on with."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mmtrain.checkpoint.load import check_same_model
from mmtrain.checkpoint.run_folder import RunFolder, Start
from mmtrain.errors import ConfigError
from tests.checkpoint.fake import checkpoint, config, said


def resume_from(folder: Path, *overrides: str) -> Path | None:
    return RunFolder(config(folder, *overrides)).resume_from(pytest.fail)


def metrics(run: Path, *steps: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_launch_goes_on_where_it_is_told(tmp_path: Path) -> None:
    assert resume_from(tmp_path) is None and resume_from(tmp_path, "run.resume=auto") is None
    assert not list(tmp_path.iterdir())
    old = checkpoint(tmp_path / "r/checkpoints/step-00000003", config(tmp_path))
    newest = checkpoint(tmp_path / "r/checkpoints/step-00000004", config(tmp_path), 4)
    with pytest.raises(ConfigError, match=r"already holds this run; give run\.resume=auto"):
        resume_from(tmp_path)
    assert resume_from(tmp_path, "run.resume=auto") == newest
    assert resume_from(tmp_path, f"run.resume={old}") == old
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resume_from(tmp_path, f"run.resume={tmp_path}/nowhere")


def test_an_aborted_start_does_not_block_its_name(tmp_path: Path) -> None:
    first = RunFolder(config(tmp_path))
    assert first.claim(Start()) == []
    other = RunFolder(config(tmp_path, "optim.beta1=0.8"))
    assert other.resume_from(pytest.fail) is None and other.claim(Start()) == []
    assert json.loads((tmp_path / "r/config.json").read_text())["optim"]["beta1"] == 0.8
    metrics(tmp_path / "r", 1, 2)
    line = said(RunFolder(config(tmp_path)).claim(Start()))
    (aside,) = (tmp_path / "r/abandoned").iterdir()
    assert str(aside) in line and "2 records" in line and aside.name.endswith("-after-step-0")
    assert steps(aside / "metrics.jsonl") == [1, 2] and not (tmp_path / "r/metrics.jsonl").exists()
    assert json.loads((aside / "config.json").read_text())["optim"]["beta1"] == 0.8


def test_the_same_start_again_writes_its_steps_again(tmp_path: Path) -> None:
    folder = RunFolder(config(tmp_path, "run.resume=auto"))
    folder.claim(Start())
    metrics(tmp_path / "r", 1, 2)
    assert folder.claim(Start()) == [] and not (tmp_path / "r/abandoned").exists()
    fitted = ["stage.phases.0.parallel={ep: 2}", "parallel.tp=2"]  # as `parallel=auto` lays it out for other processes
    for options in (fitted, []):
        assert RunFolder(config(tmp_path, "run.resume=auto", *options)).claim(Start()) == []
    assert not (tmp_path / "r/abandoned").exists()
    for option in ("run.seed=5", "stage.phases.0.parallel={aux_loss_over: global_batch}"):
        assert len(RunFolder(config(tmp_path, "run.resume=auto", option)).claim(Start())) == 1
        metrics(tmp_path / "r", 1, 2)


def test_a_record_that_cannot_be_written_is_a_wrong_folder_for_all_ranks(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "corpora.json"))

    with pytest.raises(ConfigError, match=r"cannot be written: No space left on device \(.*corpora\.json\)"):
        RunFolder(config(tmp_path)).claim(Start(), full)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = config(tmp_path).model
    same = checkpoint(tmp_path / "same", {"model": vars(model)})
    check_same_model("run.init_from", same, model)
    other = checkpoint(tmp_path / "other", {"model": vars(model) | {"num_experts": 64}})
    with pytest.raises(ConfigError, match=r"model\.num_experts=8: run\.init_from=.* holds a model with 64"):
        check_same_model("run.init_from", other, model)
    far = checkpoint(tmp_path / "far", {"model": vars(model) | {"num_experts": 64, "hidden_size": 96, "head_dim": 8}})
    with pytest.raises(ConfigError) as refused:
        check_same_model("run.resume", far, model)
    line = str(refused.value)
    assert line.startswith(f"model.hidden_size={model.hidden_size}: run.resume={far} holds a model with 96; ")
    assert (
        f"; model.head_dim 8 there, {model.head_dim} here; model.num_experts 64 there, 8 here; give the values" in line
    )


def test_an_option_that_an_old_record_lacks_counts_as_its_default(tmp_path: Path) -> None:
    model = config(tmp_path).model
    recorded = vars(model).copy()
    del recorded["shared_ffn_hidden_size"]  # as if written before there were shared experts
    old = checkpoint(tmp_path / "old", {"model": recorded})
    check_same_model("run.init_from", old, model)
    wider = config(tmp_path, "model.shared_ffn_hidden_size=64").model
    with pytest.raises(ConfigError, match=r"model\.shared_ffn_hidden_size=64: .* holds a model with 0"):
        check_same_model("run.init_from", old, wider)
