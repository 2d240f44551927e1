"""Starting a run from a Hugging Face folder: what is checked before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.checkpoint.run_folder import RunFolder, Start
from mmtrain.errors import ConfigError
from mmtrain.hf.folder import is_hf_folder
from mmtrain.train.resume import check_corpora, decide_start, weights_record
from tests.checkpoint.fake import config
from tests.hf.folders import made, write

MODEL = ["model.vocab_size=160", "model.hidden_size=48", "model.num_layers=4", "model.layer_pattern=LLLS",
         "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16", "model.ffn_hidden_size=40",
         "model.rotary_dim=8", "model.num_experts=4"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = made("hybrid, half of each head rotated", rope_base=1e6)
    return write(model, tmp_path_factory.mktemp("hf") / "m")


def start(runs: Path, folder: Path, *overrides: str) -> Start:
    options = config(runs, *MODEL, f"run.init_from={folder}", "stage.phases.0.rope_base=1e6", *overrides)
    return decide_start(options, RunFolder(options))


def test_the_same_model_starts_from_its_weights(tmp_path: Path, folder: Path) -> None:
    assert is_hf_folder(folder)
    found = start(tmp_path, folder)
    assert found.weights == folder and found.resume is None and "moments begin at 0" in found.notes[0]
    assert weights_record(found)["rope_base"] == 1e6
    assert weights_record(Start()) == {}


def test_another_model_is_refused_with_all_that_differs(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        start(tmp_path, folder, "model.hidden_size=64", "model.num_experts=8", "model.layer_pattern=LS",
              "model.norm_eps=1e-6", "model.rotary_dim=16", "model.post_norm=false")  # fmt: skip
    line = str(refused.value)
    assert line.startswith(f"run.init_from={folder}: its config.json is of another model: ") and "\n" not in line
    for part in ("hidden_size 48 there, 64 here", "num_experts 4 there, 8 here", "layer_types LLLS there, LSLS here",
                 "rotary_dim 8 there, 16 here", "post_norm True there, False here", "and 1 more"):  # fmt: skip
        assert part in line


@pytest.mark.parametrize("option", ["model.deepnorm_alpha=1.5", "model.norm_eps=1e-6", "model.top_k=1"])
def test_one_option_is_enough_to_differ(tmp_path: Path, folder: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=option.partition("=")[0].removeprefix("model.")):
        start(tmp_path, folder, option)


def test_a_lower_rope_base_is_refused_and_a_higher_one_told(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage.phases\[0\].rope_base=10000: .*were trained with 1e\+06"):
        start(tmp_path, folder, "stage.phases.0.rope_base=10000")
    assert any("rope_base=1e+07" in line for line in start(tmp_path, folder, "stage.phases.0.rope_base=1e7").notes)


def test_another_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    mine = {"tokenizer": {"kind": "bytes", "sha256": None, "content": None, "vocab_size": 257}, "sources": []}
    begun = start(tmp_path, folder)
    assert "has no tokenizer.json" in check_corpora(begun, mine, False)[0]
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    try:
        with pytest.raises(ConfigError, match=r"run.init_from=.*was trained with a tokenizer.json .*byte tokenizer"):
            check_corpora(begun, mine, False)
        assert "going on all the same" in check_corpora(begun, mine, True)[0]
    finally:
        (folder / "tokenizer.json").unlink()


def test_a_damaged_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes()[: None if path.suffix == ".json" else 3000])
    with pytest.raises(ConfigError, match=r"run\.init_from=.*cut short"):
        start(tmp_path, copy)
