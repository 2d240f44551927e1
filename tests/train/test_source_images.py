"""Corpora with images beside a model: what is refused before anything starts, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdata.errors import DataError
from mmdata.images.grid import TileRules
from mmdata.prepare.pipeline import PrepareOptions, prepare
from mmtrain.config import DataConfig, ModelConfig, PhaseConfig, SourceConfig
from mmtrain.config.cli import compose
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.train.inputs import RunInputs
from tests.data.images.made import SMALL, prepared, write_images, write_records

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GRIDS = "model.vision.grids=[[1,1],[1,2],[2,1],[2,2]]"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vl` of SMALL's tiles, `fixed` of one tile an image, `wide` of other grids, `text`: of one tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    names = write_images(folder / "images", [(16 + 2 * i, 30) for i in range(8)])
    records = write_records(folder, [{"image": f"images/{name}", "caption": f"a {name}"} for name in names])
    prepared(records, folder / "vl", valid_fraction=0.2)
    prepared(records, folder / "fixed", tokenizer=str(folder / "vl"), rules=TileRules(16, 8, ()))
    prepared(records, folder / "wide", tokenizer=str(folder / "vl"), rules=TileRules(16, 8, ((1, 3),)))
    (folder / "plain").mkdir()
    for i in range(8):
        (folder / f"plain/{i}.txt").write_text("plain text " * 9)
    prepare(PrepareOptions([folder / "plain"], folder / "text", tokenizer=str(folder / "vl"), workers=1))
    return folder


def model(*overrides: str) -> ModelConfig:
    """A model whose eyes are of SMALL's tiles."""
    given = ["model=tiny_vl", "model.vision.tile_size=16", "model.vision.patch_size=8", GRIDS,
             "model.vision.image_token=1", "data.path=x", "run.name=y", "stage=quickstart"]  # fmt: skip
    return compose([*given, *overrides], CONFIGS).model


def inputs(corpora: Path, *names: str, seq_len: int = 48, **phase: object) -> RunInputs:
    sources = [SourceConfig(str(corpora / name)) for name in names]
    return RunInputs(
        DataConfig(sources=sources), [PhaseConfig("p", Count(seq_len), 1e4, Count(1000), [], [], **phase)], 4096
    )


def test_a_model_without_eyes_is_refused_images(corpora: Path) -> None:
    text = compose(["model=tiny", "data.path=x", "run.name=y", "stage=quickstart"], CONFIGS).model
    with pytest.raises(ConfigError, match=r"data.sources\[1\].path=.*vl: holds images, and model=tiny has no eyes"):
        inputs(corpora, "text", "vl").check_images(text)
    assert inputs(corpora, "text").check_images(text) == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("model.vision.tile_size=24", "was prepared with --tile 16; give model.vision.tile_size=16"),
        ("model.vision.patch_size=4", "was prepared with --patch 8; give model.vision.patch_size=8"),
        ("model.vision.keep_class_token=true", "--class-token False; give model.vision.keep_class_token=false"),
        ("model.vision.image_token=7", "was prepared with token 1 for images; give model.vision.image_token=1"),
        ("model.vision.grids=[[1,1],[2,2]]", "--grids 1x1,1x2,2x1,2x2; prepare it again with --grids 1x1,2x2 "),
        ("model.vision.grids=[]", "give model.vision.grids=[[1,1],[1,2],[2,1],[2,2]]"),
    ],
)
def test_other_tiles_than_the_model_s_are_refused_with_both(corpora: Path, option: str, said: str) -> None:
    given = inputs(corpora, "vl")
    assert given.check_images(model()) == []
    with pytest.raises(ConfigError) as refused:
        given.check_images(model(option))
    line = str(refused.value)
    assert line.startswith(option.partition("=")[0]) and said in line and str(corpora / "vl") in line


def test_images_at_a_fixed_resolution_go_with_any_grids(corpora: Path) -> None:
    assert inputs(corpora, "fixed").check_images(model()) == []
    assert inputs(corpora, "fixed").check_images(model("model.vision.grids=[]")) == []
    with pytest.raises(ConfigError, match=r"model.vision.grids=1x1,1x2,2x1,2x2: .*wide was prepared with --grids 1x3"):
        inputs(corpora, "wide").check_images(model())


def test_one_phase_has_one_set_of_rules(corpora: Path) -> None:
    with pytest.raises(DataError, match="were prepared with different tiles or image tokens"):
        inputs(corpora, "vl", "fixed")
    own = [SourceConfig(str(corpora / "fixed"))]
    assert inputs(corpora, "vl", sources=own).check_images(model()) == []  # of two phases, or beside held-out rows


def test_eyes_with_nothing_to_see_are_told_and_text_beside_images_is_not(corpora: Path) -> None:
    (line,) = inputs(corpora, "text").check_images(model())
    assert line.startswith("warning: model=tiny_vl has eyes, and no corpus has images")
    assert inputs(corpora, "vl", "text").check_images(model()) == []


def test_a_mixture_by_tokens_with_images_is_refused(corpora: Path) -> None:
    with pytest.raises(DataError, match="holds images, which a mixture by tokens would cut: give its phase buckets"):
        inputs(corpora, "vl", "text", transition=0.5, sources=[SourceConfig(str(corpora / "vl"))])


def test_held_out_images_that_no_row_holds_are_told_before_training(corpora: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", [(10 + i, 16) for i in range(6)] + [(64 + i, 64) for i in range(6)])
    records = [{"image": f"images/{i}.png", "caption": f"{i}"} for i in range(12)]
    prepared(write_records(tmp_path, records), tmp_path / "c", valid_fraction=0.5, tokenizer=str(corpora / "vl"))
    found = inputs(tmp_path, "c", seq_len=20).check_images(model())
    assert any("valid: " in line and "documents are left out" in line for line in found), found


def test_rules_of_every_phase_are_those_of_its_corpora(corpora: Path) -> None:
    stream = inputs(corpora, "fixed").train_stream(0)
    assert {image.tokens for image in stream[0].images} == {SMALL.side**2 + 1}
