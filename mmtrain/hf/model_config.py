"""The config.json of any model: of text (`mmtrain.hf.hf_config`), or with eyes, whose text model is a part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mmdata.images.tiles import MEAN, STD
from mmtrain.checkpoint.safetensors_file import BadFile
from mmtrain.config import ModelConfig, VisionConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.hf_config import OWN, FolderModel, config_json, read_config
from mmtrain.hf.vision_config import MODEL_TYPE, read_vision_config, vision_config_json

_TEXT = "text_config"
_BICUBIC = 3  # Pillow's number


def model_config_json(
    model: ModelConfig,
    port: bool,
    dtype: torch.dtype,
    eos: int | list[int] | None,
    longest: int | None,
    reordered: bool,
) -> dict[str, Any]:
    """Return the config.json of a model; the arguments are those of :func:`~mmtrain.hf.hf_config.config_json`."""
    text = config_json(model, port, dtype, eos, longest, reordered)
    if model.vision is None:
        return text
    return {
        "architectures": ["MiniMaxVL01ForConditionalGeneration"], "torch_dtype": text["torch_dtype"],
        "tie_word_embeddings": False, "eos_token_id": eos, "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size, **vision_config_json(model), _TEXT: text, OWN: {},
    }  # fmt: skip


def read_model_config(config: dict[str, Any]) -> FolderModel:
    """Return the model that a config.json describes, with eyes or without.

    Raises:
        BadFile: it is of another architecture, lacks something, or holds a value that cannot be.
    """
    if config.get("model_type") != MODEL_TYPE:
        return read_config(config)
    text = config.get(_TEXT)
    if not isinstance(text, dict):
        raise BadFile(f"has no {_TEXT}")
    try:
        told = read_config(text)
    except BadFile as error:
        raise BadFile(f"{_TEXT} {error}") from None
    vision = read_vision_config(config, told.model.vocab_size)
    made = replace(told.model, vision=vision)
    try:
        made.validate()
    except ConfigError as error:
        raise BadFile(f"describes a model that cannot be ({error})") from None
    return FolderModel(made, told.reordered)


def preprocessor_json(vision: VisionConfig) -> dict[str, Any]:
    """Return the preprocessor_config.json of a model's eyes: how images become tiles, by LLaVA-NeXT's names."""
    size = vision.tile_size
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor",
        "do_convert_rgb": True, "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
        "do_pad": True, "size": square, "crop_size": square, "resample": _BICUBIC, "rescale_factor": 1 / 255,
        "image_mean": list(MEAN), "image_std": list(STD), "patch_size": vision.patch_size,
        "image_grid_pinpoints": [[rows * size, columns * size] for rows, columns in vision.grids],
    }  # fmt: skip
