"""The grid of an image and its tokens: against transformers' LLaVA-NeXT on sampled sizes and on every grid exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mmdata.errors import DataError
from mmdata.images.grid import RELEASED_GRIDS, TileRules, best_grid, fitted_size, image_tokens, lay_image

RELEASED = TileRules()
# The released configuration's list (height, width), written out.
PINPOINTS = [
    [336, 336], [336, 672], [336, 1008], [336, 1344], [336, 1680], [336, 2016],
    [672, 336], [672, 672], [672, 1008], [672, 1344], [672, 1680], [672, 2016],
    [1008, 336], [1008, 672], [1008, 1008], [1008, 1344], [1008, 1680], [1008, 2016],
    [1344, 336], [1344, 672], [1344, 1008], [1344, 1344],
    [1680, 336], [1680, 672], [1680, 1008],
    [2016, 336], [2016, 672], [2016, 1008],
]  # fmt: skip
EXTREMES = [(1, 1), (1, 2), (2, 1), (1, 2100), (2100, 1), (1, 50_000), (50_000, 1), (20_000, 19_999), (3, 1999),
            (337, 336), (336, 337), (335, 336), (1008, 1007), (2016, 2016), (2017, 1009), (997, 1501)]  # fmt: skip


def sampled(count: int = 3000) -> list[tuple[int, int]]:
    """Sizes (width, height) of 1 to 2,100 pixels; a third of them within two pixels of a multiple of 336."""
    draw = random.Random(1)
    near = [max(1, 336 * n + d) for n in range(7) for d in (-2, -1, 0, 1, 2)]
    sizes = [(draw.randint(1, 2100), draw.randint(1, 2100)) for _ in range(count)]
    return [(draw.choice(near), height) if i % 3 == 0 else (width, height) for i, (width, height) in enumerate(sizes)]


def llava_processor():
    """LLaVA-NeXT's counter of tokens, without a tokenizer."""
    from types import SimpleNamespace

    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    processor = object.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=PINPOINTS)
    return processor


def test_the_released_grids_are_these() -> None:
    assert [[336 * rows, 336 * columns] for rows, columns in RELEASED_GRIDS] == PINPOINTS
    assert max(rows * columns for rows, columns in RELEASED_GRIDS) == 18


def test_grids_tiles_and_tokens_are_llava_next_s() -> None:
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    processor = llava_processor()
    for width, height in sampled() + EXTREMES:
        size = (height, width)
        assert best_grid(width, height, RELEASED) == get_anyres_image_grid_shape(size, PINPOINTS, 336), size
        assert lay_image(width, height, RELEASED).tiles == image_size_to_num_patches(size, PINPOINTS, 336), size
        assert image_tokens(width, height, RELEASED) == processor._get_number_of_features(*size, 336, 336), size


def test_of_grids_in_any_order_the_least_wasteful_is_taken() -> None:
    """In the released order the least wasteful of equally effective grids is the first: there waste decides nothing."""
    from transformers.image_processing_utils import select_best_resolution

    for seed in range(3):
        pinpoints = random.Random(seed).sample(PINPOINTS, len(PINPOINTS))
        rules = TileRules(grids=tuple((height // 336, width // 336) for height, width in pinpoints))
        for width, height in sampled(300):
            rows, columns = best_grid(width, height, rules)
            assert (336 * rows, 336 * columns) == select_best_resolution((height, width), pinpoints), (width, height)


@pytest.mark.parametrize("grid", RELEASED_GRIDS)
def test_an_image_of_a_grid_s_size_fills_it(grid: tuple[int, int]) -> None:
    rows, columns = grid
    layout = lay_image(336 * columns, 336 * rows, RELEASED)
    assert layout.grid == grid and (layout.rows, layout.columns) == (24 * rows, 24 * columns)
    assert layout.tokens == 576 + 24 * rows * (24 * columns + 1)


@pytest.mark.parametrize(("width", "height"), [(500, 100), (100, 500), (1, 2100), (2100, 1), (640, 480), (700, 2000)])
def test_kept_patches_are_those_that_llava_next_unpads(width: int, height: int) -> None:
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    layout = lay_image(width, height, RELEASED)
    rows, columns = 24 * layout.grid[0], 24 * layout.grid[1]
    numbers = torch.arange(rows * columns).view(1, rows, columns)
    kept = numbers[:, layout.first_row :, layout.first_column :][:, : layout.rows, : layout.columns]
    assert torch.equal(kept, unpad_image(numbers, (height, width)))


def test_a_fixed_resolution_is_one_tile_and_a_newline() -> None:
    fixed = TileRules(grids=())
    for width, height in ((1, 1), (1000, 20), (336, 336)):
        layout = lay_image(width, height, fixed)
        assert (layout.tiles, layout.tokens) == (1, 577)
    assert image_tokens(9, 9, TileRules(tile=224, grids=())) == 257


def test_the_fitted_image_is_llava_next_s_but_for_a_pixel_that_is_rounded_down() -> None:
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension

    rounded = 0
    for width, height in [*sampled(300), (1, 1), (1, 2100), (2100, 1)]:
        layout = lay_image(width, height, RELEASED)
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        up = get_patch_output_size(image, (336 * layout.grid[0], 336 * layout.grid[1]), ChannelDimension.FIRST)
        down = fitted_size(width, height, layout, RELEASED)
        assert 0 <= up[1] - down[0] <= 1 and 0 <= up[0] - down[1] <= 1, (width, height)
        rounded += up != down[::-1]
    assert rounded > 100
    fixed = TileRules(grids=())
    assert fitted_size(9, 5000, lay_image(9, 5000, fixed), fixed) == (336, 336)


def test_rules_scale_with_the_tile() -> None:
    small = TileRules(tile=28, patch=7)
    for width, height in ((28, 28), (84, 56), (31, 150)):
        assert best_grid(width, height, small) == best_grid(12 * width, 12 * height, RELEASED)
    assert image_tokens(56, 28, small) == 16 + 4 * 9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TileRules(patch=13), "336 pixels cannot be cut into patches of 13"),
        (lambda: TileRules(patch=0), "patches of 0"),
        (lambda: TileRules(grids=((1, 0),)), "must be (rows, columns)"),
        (lambda: lay_image(0, 5, RELEASED), "0 x 5 pixels"),
        (lambda: lay_image(5, -1, RELEASED), "5 x -1 pixels"),
    ],
)
def test_sizes_and_rules_that_cannot_be_are_refused(make, words: str) -> None:
    with pytest.raises(DataError) as caught:
        make()
    assert words in str(caught.value) and "\n" not in str(caught.value)
