"""Options of the eyes: the released defaults, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdata.images.grid import RELEASED_GRIDS, TileRules
from mmtrain.config import VisionConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.vision.images import tile_rules

CONFIGS = Path(__file__).parents[2] / "configs"
GIVEN = ["run.name=a", "data.path=b"]


def test_the_released_eyes_are_the_defaults() -> None:
    assert compose([*GIVEN, "model=minimax_vl_01"], CONFIGS).model.vision == VisionConfig()
    assert compose([*GIVEN, "model=vl_3b"], CONFIGS).model.vision == VisionConfig()
    assert tile_rules(VisionConfig()) == TileRules() and len(RELEASED_GRIDS) == 28
    assert (VisionConfig().patches, VisionConfig().head_dim) == (576, 64)


def test_models_of_text_have_no_eyes() -> None:
    assert compose([*GIVEN, "model=minimax_text_01"], CONFIGS).model.vision is None


def test_options_of_the_eyes_are_set_one_by_one() -> None:
    vision = compose(
        [*GIVEN, "model=tiny_vl", "model.vision.num_layers=2", "model.vision.grids=[]"], CONFIGS
    ).model.vision
    assert (vision.num_layers, vision.grids, vision.hidden_size) == (2, [], 128)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("image_token=4096", "model.vision.image_token=4096: must be below vocab_size=4096"),
        ("patch_size=5", "model.vision.patch_size=5: must divide tile_size=56"),
        ("num_heads=3", "model.vision.num_heads=3: must divide hidden_size=128"),
        ("unused_layers=4", "model.vision.unused_layers=4: must be below num_layers=4"),
        ("grids=[[1,2],[2]]", "model.vision.grids[1]=[2]: must be [rows, columns]"),
        ("grids=[[0,2]]", "model.vision.grids[0]=[0, 2]: must be [rows, columns]"),
        ("grids=[[1,2],[1,2]]", "model.vision.grids[1]=[1, 2]: is there twice"),
        ("grids=[3]", "model.vision.grids[0]=3: expected a list"),
        ("activation=relu", "model.vision.activation=relu: not a known choice"),
    ],
)
def test_eyes_that_cannot_be_are_refused(change: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*GIVEN, "model=tiny_vl", f"model.vision.{change}"], CONFIGS)
    assert words in str(caught.value) and "\n" not in str(caught.value)
