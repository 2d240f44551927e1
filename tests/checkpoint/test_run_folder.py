"""Run folders: which checkpoint is taken, what may change between launches, what is deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.checkpoint.dcp import _swap_in, check_same_model, find_checkpoint, remove_old
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.run_folder import RunFolder, latest_checkpoint
from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config(folder: Path, *overrides: str) -> PretrainConfig:
    given = ["stage=quickstart", "data.path=x", f"run.dir={folder}", "run.name=r"]
    return compose([*given, *overrides], CONFIGS)


def checkpoint(path: Path, step: int = 3, **model: object) -> Path:
    path.mkdir(parents=True)
    (path / "meta.json").write_text(json.dumps({"step": step, "tokens": 10 * step, "config": {"model": model}}))
    return path


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert latest_checkpoint(tmp_path) is None
    checkpoint(folder / "step-00000009")
    newest = checkpoint(folder / "step-00000010")
    (folder / "step-00000011").mkdir()  # no meta.json: cut short
    checkpoint(folder / "step-00000012.writing")
    checkpoint(folder / "step-00000012.replaced")
    assert latest_checkpoint(tmp_path) == newest == latest_checkpoint(newest) == find_checkpoint("o", str(tmp_path))
    assert read_meta(newest)["tokens"] == 30
    checkpoint(folder / "step-100000000")  # nine digits come after eight
    assert latest_checkpoint(tmp_path) == folder / "step-100000000"
    remove_old(folder, 0)
    assert len(list(folder.iterdir())) == 6
    remove_old(folder, 2)
    assert {p.name for p in folder.iterdir()} == {
        "step-00000010", "step-100000000", "step-00000011", "step-00000012.writing", "step-00000012.replaced"
    }  # fmt: skip


def test_a_checkpoint_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    old, new = checkpoint(tmp_path / "step-00000003", 3), checkpoint(tmp_path / "step-00000003.writing", 4)
    _swap_in(new, old)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"] and read_meta(old)["step"] == 4


def test_a_launch_goes_on_only_with_the_options_that_change_no_number(tmp_path: Path) -> None:
    assert RunFolder(config(tmp_path)).resume_from() is None
    assert not list(tmp_path.iterdir())
    RunFolder(config(tmp_path)).claim()
    with pytest.raises(ConfigError, match=r"run\.resume=auto"):
        RunFolder(config(tmp_path)).resume_from()
    assert RunFolder(config(tmp_path, "run.resume=auto")).resume_from() is None  # no checkpoint yet: from the start
    newest = checkpoint(tmp_path / "r/checkpoints/step-00000003")
    free = ["run.max_steps=5", "log.wandb=off", "checkpoint.interval=7", "data.num_workers=3", "cluster.device=cpu"]
    assert RunFolder(config(tmp_path, "run.resume=auto", *free)).resume_from() == newest
    for option in ("optim.beta1=0.8", "model.top_k=1", "stage.token_scale=2", "data.seed=5", "run.seed=6",
                   "parallel.micro_batch_rows=2", "optim.precision=fp32"):  # fmt: skip
        with pytest.raises(ConfigError, match=option.partition("=")[0]):
            RunFolder(config(tmp_path, "run.resume=auto", option)).resume_from()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        RunFolder(config(tmp_path, f"run.resume={tmp_path}/nowhere")).resume_from()


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = config(tmp_path).model
    same = checkpoint(tmp_path / "same", **vars(model))
    check_same_model("run.init_from", same, model)
    other = checkpoint(tmp_path / "other", **(vars(model) | {"num_experts": 64}))
    with pytest.raises(ConfigError, match=r"model\.num_experts=8: run\.init_from=.* holds a model with 64"):
        check_same_model("run.init_from", other, model)


def test_an_option_that_an_old_record_lacks_counts_as_its_default(tmp_path: Path) -> None:
    model = config(tmp_path).model
    recorded = vars(model).copy()
    del recorded["shared_ffn_hidden_size"]  # as if written before there were shared experts
    old = checkpoint(tmp_path / "old", **recorded)
    check_same_model("run.init_from", old, model)
    wider = config(tmp_path, "model.shared_ffn_hidden_size=64").model
    with pytest.raises(ConfigError, match=r"model\.shared_ffn_hidden_size=64: .* holds a model with 0"):
        check_same_model("run.init_from", old, wider)
