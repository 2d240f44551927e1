"""The vision half of a MiniMax-VL-01 config.json, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtrain.checkpoint.safetensors_file import BadFile
from mmtrain.config import ModelConfig, VisionConfig
from mmtrain.errors import ConfigError

MODEL_TYPE = "minimax_vl_01"


def vision_config_json(model: ModelConfig) -> dict[str, Any]:
    """Return the keys that a config.json has of a model's eyes; the text model's go under ``text_config`` beside them.

    Args:
        model: one with eyes.
    """
    vision = model.vision
    assert vision is not None
    size = vision.tile_size
    return {
        "model_type": MODEL_TYPE,
        "image_token_index": vision.image_token,
        "projector_hidden_act": vision.projector_activation,
        "vision_feature_layer": -1 - vision.unused_layers,
        "vision_feature_select_strategy": "full" if vision.keep_class_token else "default",
        "image_grid_pinpoints": [[rows * size, columns * size] for rows, columns in vision.grids],
        "image_seq_length": vision.patches,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": vision.activation,
            "hidden_size": vision.hidden_size,
            "image_size": size,
            "intermediate_size": vision.ffn_hidden_size,
            "layer_norm_eps": vision.norm_eps,
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "projection_dim": model.hidden_size,
        },
    }  # fmt: skip


def read_vision_config(config: Mapping[str, Any], vocab_size: int) -> VisionConfig:
    """Return the eyes that a config.json describes.

    Args:
        config: the whole object.
        vocab_size: of its text model.

    Raises:
        BadFile: it describes none, or such that cannot be built here.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise BadFile(f"has model_type {str(config.get('model_type'))[:80]!r}, not {MODEL_TYPE!r}")
    tower = _group(config, "vision_config")
    size = _whole(tower, "image_size")
    if tower.get("num_channels", 3) != 3:
        raise BadFile("describes tiles of other channels than red, green and blue")
    strategy = config.get("vision_feature_select_strategy")
    if strategy not in ("default", "full"):
        raise BadFile(f"has vision_feature_select_strategy {str(strategy)[:80]!r}, not default or full")
    vision = VisionConfig(
        image_token=_whole(config, "image_token_index"),
        tile_size=size,
        patch_size=_whole(tower, "patch_size"),
        grids=[_grid(pinpoint, size) for pinpoint in config.get("image_grid_pinpoints") or []],
        hidden_size=_whole(tower, "hidden_size"),
        num_layers=_whole(tower, "num_hidden_layers"),
        num_heads=_whole(tower, "num_attention_heads"),
        ffn_hidden_size=_whole(tower, "intermediate_size"),
        activation=str(tower.get("hidden_act")),
        norm_eps=float(tower.get("layer_norm_eps", 1e-5)),
        unused_layers=-1 - _whole(config, "vision_feature_layer"),
        keep_class_token=strategy == "full",
        projector_activation=str(config.get("projector_hidden_act")),
    )
    try:
        vision.validate(vocab_size, "vision_config")
    except ConfigError as error:
        raise BadFile(f"describes eyes that cannot be: {error}") from None
    return vision


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(config.get(name), dict):
        raise BadFile(f"has no {name}")
    return config[name]


def _whole(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int:
        raise BadFile(f"has {name} {str(value)[:80]!r}, which is no whole number")
    return value


def _grid(pinpoint: Any, size: int) -> list[int]:
    """Return rows and columns of tiles of a resolution (height, width)."""
    sides = pinpoint if isinstance(pinpoint, list) and len(pinpoint) == 2 else [None, None]
    if not all(type(side) is int and side > 0 and side % size == 0 for side in sides):
        raise BadFile(f"has the grid {str(pinpoint)[:80]}, which is not (height, width) in whole tiles of {size}")
    return [side // size for side in sides]
