"""Exact parameter counts and floating-point operations of the eyes: arithmetic only, no torch."""

from __future__ import annotations

from mmtrain.config import ModelConfig, VisionConfig


def count_vision_parameters(model: ModelConfig) -> dict[str, int]:
    """Count the parameters of a model's eyes by part; nothing for a model without them.

    They come on top of :func:`mmtrain.model.flops.count_parameters`.
    """
    vision = model.vision
    if vision is None:
        return {}
    width, hidden = vision.hidden_size, model.hidden_size
    embedding = width + 3 * vision.patch_size**2 * width + (vision.patches + 1) * width
    biases = 4 * width + vision.ffn_hidden_size + width
    norms = 2 * 2 * width
    tower = embedding + 2 * width + vision.num_layers * (_layer_matrices(vision) + biases + norms)
    projector = width * hidden + hidden + hidden * hidden + hidden
    counts = {"vision_tower": tower, "projector": projector, "newline": hidden}
    if vision.contrastive is not None:
        counts["contrastive"] = vision.contrastive.size * (width + hidden) + 1
    return counts


def encoder_flops(model: ModelConfig, tiles: float, patches: float) -> float:
    """Count the operations of the forward pass over images; backward has twice as many.

    A product of [m, k] by [k, n] counts 2mnk, as in `mmtrain.model.flops`.

    Args:
        model: one with eyes.
        tiles: of all images.
        patches: tokens of images that are projected, which newlines are not.
    """
    vision = model.vision
    assert vision is not None
    tokens = vision.patches + 1
    layers = vision.num_layers - vision.unused_layers
    a_tile = 2 * vision.patches * 3 * vision.patch_size**2 * vision.hidden_size
    a_tile += layers * (2 * tokens * _layer_matrices(vision) + 4 * tokens**2 * vision.hidden_size)
    a_patch = 2 * (vision.hidden_size * model.hidden_size + model.hidden_size**2)
    return float(tiles * a_tile + patches * a_patch)


def _layer_matrices(vision: VisionConfig) -> int:
    return 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size
