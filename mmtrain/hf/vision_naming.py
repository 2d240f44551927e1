"""Names and shapes that the eyes' parameters have in the files of the released MiniMax-VL-01.

The text model lies beside them, each of its names (`mmtrain.hf.naming`) after ``language_model.``. The vision tower is
transformers' `CLIPVisionModel` without the norm of its class token, which the release does not hold.

Legend: W width of the vision transformer, D of the language model, Q positions, X = 3 patch_size^2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.hf.naming import Piece, file_shapes

LANGUAGE_MODEL = "language_model."
TOWER = "vision_tower.vision_model."
"""What the names of the vision tower's tensors begin with."""
_LAYER = re.compile(r"vision_tower\.layers\.(\d+)\.(.+)")
_EMBEDDINGS = {
    "vision_tower.embedding.class_W": "class_embedding",
    "vision_tower.embedding.patch_WX": "patch_embedding.weight",
    "vision_tower.embedding.position_QW": "position_embedding.weight",
}
_PROJECTIONS = {"attention.qkv_3WW": "weight", "attention.qkv_bias_3W": "bias"}
_ROOMS = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attention.out_proj": "self_attn.out_proj",
          "fc1": "mlp.fc1", "fc2": "mlp.fc2"}  # fmt: skip
_NO_WEIGHTS = re.compile(rf"{re.escape(TOWER)}(post_layernorm\.(weight|bias)|embeddings\.position_ids)")


def vision_pieces_of(parameter: str, shape: Sequence[int], patch_size: int) -> list[Piece]:
    """Return the tensors that make up one parameter of the eyes.

    Args:
        parameter: its name in :class:`~mmtrain.vision.encoder.ImageEncoder`.
        shape: of the full parameter.
        patch_size: pixels of a patch's side.
    """
    shape = tuple(shape)
    if parameter in _EMBEDDINGS:
        is_patch = parameter.endswith("patch_WX")
        there = (shape[0], 3, patch_size, patch_size) if is_patch else shape  # a convolution's weight
        return [Piece(f"{TOWER}embeddings.{_EMBEDDINGS[parameter]}", there)]
    if parameter == "newline_D":
        return [Piece("image_newline", shape)]
    found = _LAYER.fullmatch(parameter)
    if found is None:
        names = {"projector.": "multi_modal_projector.", "vision_tower.pre_norm.": f"{TOWER}pre_layrnorm."}
        ours = next(name for name in names if parameter.startswith(name))
        return [Piece(names[ours] + parameter.removeprefix(ours), shape)]
    layer, rest = f"{TOWER}encoder.layers.{found[1]}", found[2]
    if rest in _PROJECTIONS:
        names_qkv = [f"{layer}.self_attn.{letter}_proj.{_PROJECTIONS[rest]}" for letter in "qkv"]
        return [Piece(name, shape[1:], (i,)) for i, name in enumerate(names_qkv)]
    room, _, leaf = rest.rpartition(".")
    return [Piece(f"{layer}.{_ROOMS[room]}.{leaf}", shape)]


def pieces_of_encoder(encoder: nn.Module) -> dict[str, tuple[Tensor, list[Piece]]]:
    """Return every parameter of the eyes by its name, with the tensors that make it up."""
    patch_size = encoder.config.patch_size
    return {
        name: (parameter, vision_pieces_of(name, parameter.shape, patch_size))
        for name, parameter in encoder.named_parameters()
    }


def vision_file_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model's eyes by its name in the released files.

    Raises:
        ConfigError: the model has no eyes.
    """
    every = pieces_of_encoder(meta_model(model).encoder).values()
    return {piece.name: piece.shape for _, pieces in every for piece in pieces}


def vision_language_file_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a whole model by its name in the released files.

    Raises:
        ConfigError: the model has no eyes, or layers of a kind that the format does not have.
    """
    text = file_shapes(model, stacked=False).items()
    return vision_file_shapes(model) | {f"{LANGUAGE_MODEL}{name}": shape for name, shape in text}


def holds_no_weights_of_ours(name: str) -> bool:
    """Tell whether a tensor of a CLIP vision tower is none that the release has: the class token's norm, positions."""
    return _NO_WEIGHTS.fullmatch(name) is not None
