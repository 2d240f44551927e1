"""Rows of images of many resolutions with text between them, of random pixels, for the bench of eyes."""

from __future__ import annotations

import random

import torch

from mmdata.images.batch import BatchImage, ImageBatch
from mmdata.images.grid import lay_image
from mmdata.images.row import RowImage
from mmtrain.config import ModelConfig
from mmtrain.vision.images import tile_rules

SIZES = ((336, 336), (640, 480), (1024, 768), (1280, 720), (600, 1800), (1920, 1080))
"""Width and height of images, each as likely as the others."""
FEW = 0.5  # of the rows, which have at most one image


def vision_rows(model: ModelConfig, seq_len: int, seed: int) -> ImageBatch:
    """One row: half of the rows are full of images, the others have one at most."""
    draw, vision = random.Random(seed), model.vision
    assert vision is not None
    tokens_S = torch.randint(10, model.vocab_size, (seq_len,), generator=torch.Generator().manual_seed(seed))
    mask_S, images, place, first_tile = torch.ones(seq_len, dtype=torch.bool), [], 0, 0
    most = 1 if draw.random() < FEW else seq_len
    while len(images) < most:
        place += draw.randint(10, 200)
        width, height = draw.choice(SIZES)
        layout = lay_image(width, height, tile_rules(vision))
        if place + layout.tokens >= seq_len:
            break
        source = RowImage("drawn", 0, 0, width, height, place, layout.tokens)
        images.append(BatchImage(source, place, layout.tokens, first_tile, layout))
        tokens_S[place : place + layout.tokens], mask_S[place : place + layout.tokens] = vision.image_token, False
        place, first_tile = place + layout.tokens, first_tile + layout.tiles
    tiles = torch.randint(0, 256, (first_tile, 3, vision.tile_size, vision.tile_size), dtype=torch.uint8)
    return ImageBatch(
        tokens_S[None],
        tokens_S.roll(-1)[None],
        mask_S[None],
        torch.arange(seq_len)[None],
        torch.tensor([0, seq_len], dtype=torch.int32),
        (seed,),
        tiles_TCHW=tiles,
        images=tuple(images),
    )
