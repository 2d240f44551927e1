"""The eyes in the released layout: names, shapes, a round trip, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain.checkpoint.safetensors_file import BadFile
from mmtrain.config import ModelConfig, VisionConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.hf.vision_config import read_vision_config, vision_config_json
from mmtrain.hf.vision_naming import LANGUAGE_MODEL, vision_file_shapes, vision_language_file_shapes
from mmtrain.hf.vision_weights import load_vision_tensors, vision_tensors
from tests.vision.small import small_eyes, small_vl_config, small_vl_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# What transformers' port of MiniMax-VL-01 records of the released index: the number of its names, and the SHA-256 of
# all of them, sorted, one a line.
RELEASED_NAMES = 8_637, "d0caf1b714cdfc4caa65b56cbec591668d77b0e2a5d6cf3b5af169531311c886"


def released() -> ModelConfig:
    return compose(["model=minimax_vl_01", "run.name=a", "data.path=b"], CONFIGS).model


def test_names_of_the_release_are_ours() -> None:
    named = vision_language_file_shapes(released())
    assert (len(named), hashlib.sha256("\n".join(sorted(named)).encode()).hexdigest()) == RELEASED_NAMES


def test_shapes_are_those_of_llava_next_with_the_released_vision() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextModel

    model = released()
    told = vision_config_json(model)
    vision = {name: value for name, value in told["vision_config"].items() if name != "model_type"}
    text = LlamaConfig(hidden_size=model.hidden_size, num_hidden_layers=1, intermediate_size=8, vocab_size=8)
    with torch.device("meta"):
        theirs = LlavaNextModel(LlavaNextConfig(vision_config=CLIPVisionConfig(**vision), text_config=text))
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): tuple(parameter.shape)
             for name, parameter in theirs.named_parameters() if not name.startswith("language_model.")}  # fmt: skip
    after_norm = {name for name in named if ".post_layernorm." in name}
    assert len(after_norm) == 2
    assert vision_file_shapes(model) == {name: shape for name, shape in named.items() if name not in after_norm}


def test_weights_go_out_into_a_file_and_back_to_the_bit(tmp_path: Path) -> None:
    model, other = small_vl_model(seed=3), small_vl_model(seed=4)
    tensors = dict(vision_tensors(model.encoder))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == vision_file_shapes(model.config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "eyes.safetensors")
    load_vision_tensors("run.init_from", load_file(tmp_path / "eyes.safetensors"), other.encoder)
    for (name, a), b in zip(model.encoder.named_parameters(), other.encoder.parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(small_vl_model(seed=4).named_parameters(), other.parameters(), strict=True):
        assert name.startswith("encoder.") or torch.equal(a, b), name


def test_each_projection_has_its_own_name() -> None:
    encoder = small_vl_model().encoder
    tensors = dict(vision_tensors(encoder))
    layer, there = encoder.vision_tower.layers[1], "vision_tower.vision_model.encoder.layers.1.self_attn"
    for i, letter in enumerate("qkv"):
        assert torch.equal(tensors[f"{there}.{letter}_proj.weight"], layer.attention.qkv_3WW[i])
        assert torch.equal(tensors[f"{there}.{letter}_proj.bias"], layer.attention.qkv_bias_3W[i])
    assert torch.equal(tensors[f"{there}.out_proj.weight"], layer.attention.out_proj.weight)


def test_the_text_model_and_a_tower_s_spare_tensors_may_lie_beside() -> None:
    encoder = small_vl_model().encoder
    spare = {f"{LANGUAGE_MODEL}lm_head.weight": torch.zeros(1), "vision_tower.vision_model.post_layernorm.bias":
             torch.zeros(32), "vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 17)}  # fmt: skip
    load_vision_tensors("run.init_from", dict(vision_tensors(encoder)) | spare, encoder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_newline": None}, "run.init_from=image_newline: is missing"),
        ({"image_newline": torch.zeros(7)}, "is of [7], and the model's of [48]"),
        ({"vision_tower.extra": torch.zeros(1)}, "vision_tower.extra: has no place in the model"),
    ],
)
def test_tensors_of_another_model_are_refused_before_any_is_copied(change: dict, words: str) -> None:
    model, other = small_vl_model(seed=3), small_vl_model(seed=4)
    tensors = {name: tensor for name, tensor in (dict(vision_tensors(model.encoder)) | change).items()
               if tensor is not None}  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_vision_tensors("run.init_from", tensors, other.encoder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    before = small_vl_model(seed=4).encoder
    assert all(torch.equal(a, b) for a, b in zip(other.encoder.parameters(), before.parameters(), strict=True))


def test_the_released_config_is_read_and_written() -> None:
    told = vision_config_json(released())
    assert (told["image_token_index"], told["vision_feature_layer"]) == (200_025, -1)
    assert told["image_grid_pinpoints"][:2] == [[336, 336], [336, 672]] and len(told["image_grid_pinpoints"]) == 28
    assert read_vision_config(told, 200_064) == released().vision == VisionConfig()
    odd = small_vl_config(dict(unused_layers=1, keep_class_token=True, activation="quick_gelu"))
    assert read_vision_config(vision_config_json(odd), 160) == odd.vision


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava_next"}, "has model_type 'llava_next', not 'minimax_vl_01'"),
        ({"vision_config": None}, "has no vision_config"),
        ({"image_token_index": "x"}, "has image_token_index 'x', which is no whole number"),
        ({"image_grid_pinpoints": [[28, 30]]}, "has the grid [28, 30]"),
        ({"vision_feature_layer": 2}, "vision_config.unused_layers=-3"),
        ({"vision_feature_layer": [1, 2]}, "vision_feature_layer '[1, 2]'"),
        ({"vision_feature_select_strategy": "cls"}, "not default or full"),
        ({"image_token_index": 160}, "must be below vocab_size=160"),
    ],
)
def test_configs_of_other_models_are_refused(change: dict, words: str) -> None:
    told = vision_config_json(small_vl_config()) | change
    with pytest.raises(BadFile) as caught:
        read_vision_config(told, 160)
    assert words in str(caught.value)


def test_small_eyes_are_a_valid_configuration() -> None:
    small_eyes().validate(160)
