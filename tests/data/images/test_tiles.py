"""Tiles of an image: against transformers' LLaVA-NeXT processor where it rounds alike, and by hand elsewhere."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from mmdata.errors import DataError
from mmdata.images.grid import TileRules, lay_image
from mmdata.images.tiles import MEAN, STD, cut_tiles, normalise

RELEASED = TileRules()
SMALL = TileRules(tile=28, patch=7, grids=((1, 1), (1, 2), (2, 1), (2, 2), (1, 3)))


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with noise, the same for a size."""
    generator = np.random.default_rng(width * 10007 + height)
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    noise = generator.integers(0, 55, (height, width, 3))
    return Image.fromarray((np.stack([x, y, 200 - x], -1) + noise).astype(np.uint8)).convert(mode)


# Sizes whose resized sides are whole numbers, so that rounding up and down are the same.
@pytest.mark.parametrize(
    "size", [(640, 480), (336, 336), (672, 336), (400, 1600), (100, 400), (2016, 1008), (1200, 300)]
)
def test_tiles_are_those_of_llava_next(size: tuple[int, int]) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    pinpoints = [[336 * rows, 336 * columns] for rows, columns in RELEASED.grids]
    processor = LlavaNextImageProcessorPil(
        size={"height": 336, "width": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=pinpoints
    )
    theirs = np.asarray(processor(drawn(*size), return_tensors="np")["pixel_values"][0])
    tiles, layout = cut_tiles(drawn(*size), RELEASED)
    assert tiles.dtype == np.uint8 and tiles.flags["C_CONTIGUOUS"]
    assert len(tiles) == layout.tiles == len(theirs)
    assert np.abs(normalise(tiles) - theirs).max() < 1e-5


def test_the_thumbnail_is_the_first_and_tiles_follow_row_by_row() -> None:
    image = Image.new("RGB", (56, 56))
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)]
    for i, colour in enumerate(colours):
        image.paste(colour, (28 * (i % 2), 28 * (i // 2), 28 * (i % 2) + 28, 28 * (i // 2) + 28))
    tiles, layout = cut_tiles(image, SMALL)
    assert layout.grid == (2, 2)
    for tile, colour in zip(tiles[1:], colours, strict=True):
        assert (tile == np.asarray(colour)[:, None, None]).all()
    assert [tuple(tiles[0][:, y, x]) for y, x in ((3, 3), (3, 24), (24, 3), (24, 24))] == colours


@pytest.mark.parametrize("size", [(90, 31), (31, 90), (56, 9), (200, 3)])
def test_patches_that_are_left_out_are_black_and_those_at_their_edge_are_not(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 200, 200))
    tiles, layout = cut_tiles(image, SMALL)
    rows, columns = layout.grid
    whole = tiles[1:].reshape(rows, columns, 3, 28, 28).transpose(2, 0, 3, 1, 4).reshape(3, 28 * rows, 28 * columns)
    below, right = layout.first_row + layout.rows, layout.first_column + layout.columns
    kept = np.zeros(whole.shape[1:], bool)
    kept[7 * layout.first_row : 7 * below, 7 * layout.first_column : 7 * right] = True
    lit = whole[0] > 0
    unseen = lit & ~kept
    # The image is less than two patches higher than what is kept of it (LLaVA-NeXT rounds the kept rows down).
    assert unseen.sum() <= 14 * max(whole.shape[1:])
    assert lit[kept].mean() > 0.5 if kept.any() else layout.rows * layout.columns == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    image = Image.new("I;16", (30, 30)) if mode == "I;16" else drawn(30, 30, mode)
    tiles, layout = cut_tiles(image, SMALL)
    assert tiles.shape == (layout.tiles, 3, 28, 28) and tiles.dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3), (4000, 7)])
def test_the_smallest_and_longest_images_are_cut(size: tuple[int, int]) -> None:
    for rules in (RELEASED, SMALL, TileRules(grids=())):
        tiles, layout = cut_tiles(Image.new("RGB", size, (9, 9, 9)), rules)
        assert len(tiles) == layout.tiles and layout == lay_image(*size, rules)
        assert (tiles[0] == 9).all() and layout.tokens >= rules.side**2


def test_any_size_has_as_many_tiles_as_are_counted() -> None:
    draw = random.Random(2)
    for _ in range(50):
        size = draw.randint(1, 200), draw.randint(1, 200)
        tiles, layout = cut_tiles(Image.new("RGB", size), SMALL)
        assert tiles.shape == (layout.tiles, 3, 28, 28)


def test_normalised_pixels_have_clip_s_mean_and_deviation() -> None:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert list(MEAN) == OPENAI_CLIP_MEAN and list(STD) == OPENAI_CLIP_STD
    x = normalise(np.full((1, 3, 2, 2), 255, np.uint8))
    assert x.dtype == np.float32
    assert x[0, :, 0, 0] == pytest.approx([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(DataError, match="0 x 5 pixels"):
        cut_tiles(Image.new("RGB", (0, 5)), SMALL)
