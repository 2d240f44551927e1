"""A small model with eyes to serve, prompts with images, and what whole forward passes give for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mmdata.images.grid import lay_image
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.model.packed_seq import Packing
from mmtrain.vision.images import Images, tile_rules
from mmtrain.vision.model import images_of
from mmtrain.vision.prompt_images import PromptImages
from tests.vision.small import IMAGE, small_vl_model

Part = int | tuple[int, int, int]


def seeing_model(**changes: object) -> nn.Module:
    """A model in fp32, with four layers of both kinds and experts."""
    text = dict(num_layers=4, layer_pattern="LLS", num_experts=4, capacity_factor=0.25)
    return small_vl_model(**(text | changes)).float()


def prompt_of(model: nn.Module, *parts: Part) -> tuple[tuple[int, ...], PromptImages]:
    """A prompt of texts and images.

    Args:
        model: whose rules cut images.
        parts: a number n for n drawn ids; (width, height, seed) for an image.
    """
    rules, rng = tile_rules(model.config.vision), np.random.default_rng(7)
    tokens: list[int] = []
    layouts, firsts, tiles = [], [], []
    for part in parts:
        if isinstance(part, int):
            tokens += rng.integers(0, IMAGE, part).tolist()
            continue
        width, height, seed = part
        layouts.append(lay_image(width, height, rules))
        firsts.append(len(tokens))
        shape = layouts[-1].tiles, 3, rules.tile, rules.tile
        tiles.append(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
        tokens += [IMAGE] * layouts[-1].tokens
    return tuple(tokens), PromptImages(np.concatenate(tiles), tuple(layouts), tuple(firsts))


def asked(tokens: tuple[int, ...], images: PromptImages | None, count: int = 5, **rest: object) -> GenerationRequest:
    """A greedy request."""
    return GenerationRequest(tokens, count, images=images, **rest)


@torch.no_grad()
def whole_logits(model: nn.Module, row: tuple[int, ...], images: PromptImages) -> Tensor:
    """Logits [T, V] of the whole forward pass, without a cache."""
    shown = Images(torch.from_numpy(images.tiles_N3SS), images.layouts)
    prompt = torch.tensor(row[: images.spans[-1][1]])
    given = images_of(prompt, shown, IMAGE)
    return model.eval()(torch.tensor(row), Packing.from_lengths([len(row)]), given=given)


@torch.no_grad()
def greedy_seeing(model: nn.Module, tokens: tuple[int, ...], images: PromptImages, count: int = 5) -> list[int]:
    """Ids that whole forward passes choose, one after the other."""
    row = list(tokens)
    for _ in range(count):
        row.append(int(whole_logits(model, tuple(row), images)[-1].argmax()))
    return row[len(tokens) :]
