"""Runs that train a vision transformer from nothing: resumed to the bit, at a larger tile, for a larger model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmdata.images.grid import TileRules
from mmtrain.checkpoint.listing import step_of
from mmtrain.checkpoint.positions import POSITIONS, resize_positions
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.config import RunConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.log.metrics import read_metrics
from mmtrain.train.resume import decide_start
from tests.data.images.made import prepared, write_images, write_records
from tests.dist.runs import SMALL, pretrain
from tests.dist.warm import ROOT
from tests.hf.test_eyes_folder import clip_folder
from tests.vision.small import small_vl_model

EYES = [
    "model=tiny_vit", "model.num_experts=0", "model.vision.image_token=1", "model.vision.tile_size=16",
    "model.vision.hidden_size=16", "model.vision.num_layers=2", "model.vision.num_heads=2",
    "model.vision.ffn_hidden_size=24", "model.vision.contrastive.size=12", "model.vocab_size=300",
]  # fmt: skip
FIXED = [option for option in SMALL if not option.startswith(("model.vocab_size", "model.num_experts"))]
PARTS = "encoder.vision_tower.layers.1.fc2.weight", "encoder.vision_tower.embedding.class_W"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Captions of small pictures, with tiles of 16 and of 24 pixels, by one tokenizer."""
    folder = tmp_path_factory.mktemp("captions")
    names = write_images(folder / "images", [(12 + i, 30 - i // 2) for i in range(40)])
    records = [{"image": f"images/{name}", "caption": f"picture {i} of {'red' if i % 3 else 'blue'}"}
               for i, name in enumerate(names)]  # fmt: skip
    path, tokenizer = write_records(folder, records), "train"
    for size in (16, 24):
        prepared(path, folder / f"{size}", rules=TileRules(size, 8, ()), tokenizer=tokenizer, valid_fraction=0.1)
        tokenizer = str(folder / "16" / "tokenizer.json")
    return {size: folder / f"{size}" for size in (16, 24)}


def train(runs: Path, name: str, corpus: Path, *overrides: str, processes: int = 1) -> Path:
    given = [f"run.dir={runs}", f"run.name={name}", f"data.path={corpus}"]
    pretrain(*FIXED, *EYES, *given, *overrides, processes=processes)
    return runs / name


def weights(run: Path, *names: str) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*"), key=step_of)
    metadata = metadata_of("run", newest)
    state = {name: torch.empty(metadata.state_dict_metadata[f"model.{name}"].size) for name in names}
    load_shards("run", newest, metadata, {"model": state}, alone=True)
    return state


def figures(run: Path) -> list[dict]:
    kept = "step", "loss", "aux_loss", "grad_norm", "contrastive_loss", "image_to_text", "contrastive_pairs"
    return [{name: record[name] for name in kept} for record in read_metrics(run) if "contrastive_loss" in record]


@pytest.fixture(scope="module")
def trained(corpora: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), "whole", corpora[16], "run.max_steps=4", "checkpoint.interval=2",
                 processes=2)  # fmt: skip


def test_metrics_tell_the_contrastive_loss(trained: Path) -> None:
    found = figures(trained)
    assert [one["step"] for one in found] == [1, 2, 3, 4]
    assert all(one["contrastive_loss"] > 0 and 8 <= one["contrastive_pairs"] <= 12 for one in found)
    assert all(one["aux_loss"] == pytest.approx(0.5 * one["contrastive_loss"], rel=1e-5) for one in found)


def test_a_resumed_run_is_the_same_run(corpora: dict[int, Path], trained: Path, tmp_path: Path) -> None:
    """From the checkpoint in its middle: all that came later is done again."""
    again = shutil.copytree(trained, tmp_path / "whole")
    shutil.rmtree(again / "checkpoints/step-00000004")
    train(tmp_path, "whole", corpora[16], "run.max_steps=4", "run.resume=auto", processes=2)
    assert " after step 2\n" in (again / "log.txt").read_text()
    assert figures(again) == figures(trained)
    names = (POSITIONS, "contrastive.log_scale_1", "contrastive.image_EF", "lm_head.weight", *PARTS)
    ours, theirs = weights(again, *names), weights(trained, *names)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("moments", [True, False])
def test_a_larger_tile_begins_with_interpolated_positions(
    corpora: dict[int, Path], trained: Path, tmp_path: Path, moments: bool
) -> None:
    overrides = ["model.vision.tile_size=24", f"run.init_from={trained}", f"run.init_optimizer={moments}",
                 "run.max_steps=1", "stage.phases.0.lr=[{kind: constant, tokens: 512, end: 0.0}]"]  # fmt: skip
    run = train(tmp_path, "larger", corpora[24], *overrides, processes=2)
    before = weights(trained, POSITIONS, *PARTS)
    after = weights(run, POSITIONS, *PARTS)
    torch.testing.assert_close(after[POSITIONS], resize_positions(before[POSITIONS], 10))
    assert all(torch.equal(after[name], before[name]) for name in PARTS)
    assert "position embeddings of tiles of 16 are interpolated" in (run / "log.txt").read_text()


def test_a_larger_text_model_takes_the_eyes_alone(corpora: dict[int, Path], trained: Path, tmp_path: Path) -> None:
    overrides = ["model.vision.contrastive=null", "model.hidden_size=48", "model.num_layers=3", "run.max_steps=1",
                 f"run.init_from={trained}", "run.init_parts=[encoder]",
                 "stage.phases.0.lr=[{kind: constant, tokens: 512, end: 0.0}]"]  # fmt: skip
    run = train(tmp_path, "eyes", corpora[16], *overrides)
    before, after = weights(trained, *PARTS), weights(run, *PARTS)
    assert all(torch.equal(after[name], before[name]) for name in PARTS)
    assert "projector and newline begin anew" in (run / "log.txt").read_text()
    assert "contrastive_loss" not in json.dumps(read_metrics(run))


def test_text_of_one_run_and_eyes_of_another(corpora: dict[int, Path], trained: Path, tmp_path: Path) -> None:
    """On two ranks, which share the weights: text of the first run, the eyes of the second, all moments anew."""
    still = "stage.phases.0.lr=[{kind: constant, tokens: 512, end: 0.0}]"
    alone = "model.vision.contrastive=null"
    text = train(tmp_path, "text", corpora[16], "run.max_steps=1", "run.seed=7", "parallel.micro_batch_rows=2", alone)
    run = train(tmp_path, "both", corpora[16], f"run.init_from={text}", f"run.init_eyes={trained}", "run.max_steps=1",
                still, alone, processes=2)  # fmt: skip
    names = "lm_head.weight", "layers.1.mixer.o_proj.weight"
    eyes = (*PARTS, POSITIONS, "encoder.projector.linear_1.weight", "encoder.newline_D")
    after = weights(run, *names, *eyes)
    assert all(torch.equal(after[name], value) for name, value in weights(text, *names).items())
    assert all(torch.equal(after[name], value) for name, value in weights(trained, *eyes).items())
    log = (run / "log.txt").read_text()
    assert f"weights of {text}" in log and f"eyes of {trained}" in log and "begin anew" not in log


def test_a_pipeline_s_first_stage_takes_the_eyes_of_a_folder(corpora: dict[int, Path], tmp_path: Path) -> None:
    source = small_vl_model(dict(activation="quick_gelu", tile_size=16, patch_size=8, hidden_size=16, num_layers=2,
                                 num_heads=2, ffn_hidden_size=24)).float()  # fmt: skip
    folder = clip_folder(source, tmp_path / "clip")
    overrides = [f"run.init_eyes={folder}", "model.vision.activation=quick_gelu", "model.vision.contrastive=null",
                 "parallel.pp=2", "parallel.micro_batch_rows=1", "run.max_steps=1",
                 "stage.phases.0.lr=[{kind: constant, tokens: 512, end: 0.0}]"]  # fmt: skip
    run = train(tmp_path, "piped", corpora[16], *overrides, processes=2)
    theirs = dict(source.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in weights(run, *PARTS, POSITIONS).items())
    assert "projector and newline begin anew" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("model.vision.num_layers=3", "model.vision.num_layers=3: run.init_eyes=.* holds eyes with 2"),
        ("model.vision=null", "run.init_eyes=.*: model=tiny_vit has no eyes"),
        ("run.init_eyes=nothing", "run.init_eyes=nothing: "),
    ],
)  # fmt: skip
def test_eyes_that_do_not_fit_are_refused(trained: Path, tmp_path: Path, option: str, line: str) -> None:
    given = [f"run.init_eyes={trained}", *FIXED, *EYES, "run.name=no", f"run.dir={tmp_path}", "data.path=c"]
    given = [one for one in given if option != "model.vision=null" or not one.startswith("model.vision")]
    config = compose([*given, option], ROOT / "configs")
    with pytest.raises(ConfigError, match=line):
        decide_start(config, RunFolder(config))


@pytest.mark.parametrize(
    ("overrides", "parts", "line"),
    [
        (["model.vision.num_layers=3"], [], "model.vision.num_layers=3: "),
        (["model.vision.num_heads=4"], [], "model.vision.num_heads=4: "),
        (["model.vision.contrastive.size=8"], [], "model.vision.contrastive.size=8: "),
        (["model.vision.num_layers=1"], ["encoder"], "model.vision.num_layers=1: "),
        ([], ["eyes"], r"run.init_parts\[0\]=eyes: fits no parameter of the model"),
        (["model.hidden_size=48"], ["encoder", "lm_head"], r"lm_head.weight is \[300, 48\] here and "),
        (["model.num_layers=1"], ["layers"], "has layers.1.*, which this model has not"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(
    trained: Path, tmp_path: Path, overrides: list[str], parts: list[str], line: str
) -> None:
    given = [*FIXED, *EYES, "run.name=no", f"run.dir={tmp_path}", "data.path=c", f"run.init_from={trained}"]
    config = compose([*given, *overrides, f"run.init_parts=[{','.join(parts)}]"], ROOT / "configs")
    with pytest.raises(ConfigError, match=line):
        decide_start(config, RunFolder(config))


def test_parts_without_a_run_to_take_them_from_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.init_parts=.*nothing to take them from"):
        RunConfig("a", init_parts=["encoder"]).validate()
