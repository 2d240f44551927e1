"""Cutting of a decoded image into tiles: resized, in the middle of its grid, black around it; Pillow and NumPy alone.

Legend: N tiles of the image, S pixels of a tile's side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmdata.images.grid import ImageLayout, TileRules, fitted_size, lay_image

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue, of 0 to 1, that CLIP's pixels are normalised with."""

STD = (0.26862954, 0.26130258, 0.27577711)
"""Deviation of red, green and blue, likewise."""


def cut_tiles(
    image: Image, rules: TileRules, full_size: tuple[int, int] | None = None
) -> tuple[np.ndarray, ImageLayout]:
    """Cut an image into a thumbnail and the tiles of its best grid.

    The thumbnail is the whole image, stretched to a square. For the grid, the image keeps its proportions (but for one
    pixel) and lies in the middle, black around it. Resampling is bicubic.

    Args:
        image: decoded, of any mode; turned as its metadata asks for already.
        rules: how images become tiles.
        full_size: its width and height, which decide the grid, where it was decoded at a fraction of them.

    Returns:
        uint8 [N, 3, S, S], the thumbnail first, then the grid row by row; and the layout of the tokens.

    Raises:
        DataError: the image has no pixels.
    """
    size = rules.tile
    layout = lay_image(*(full_size or image.size), rules)
    image = image if image.mode == "RGB" else image.convert("RGB")
    thumbnail_SS3 = _resized(image, size, size)
    rows, columns = layout.grid
    if not rows:
        return _channels_first(thumbnail_SS3[None]), layout
    canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
    width, height = fitted_size(*(full_size or image.size), layout, rules)
    top, left = (rows * size - height) // 2, (columns * size - width) // 2
    canvas[top : top + height, left : left + width] = _resized(image, width, height)
    tiles = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return _channels_first(np.concatenate([thumbnail_SS3[None], tiles])), layout


def normalise(tiles_N3SS: np.ndarray) -> np.ndarray:
    """Return tiles of uint8 as float32, (x / 255 - mean) / deviation of each channel, as CLIP sees them."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (MEAN, STD))
    return (tiles_N3SS.astype(np.float32) / 255 - mean) / std


def _resized(image: Image, width: int, height: int) -> np.ndarray:
    from PIL.Image import Resampling

    return np.asarray(image.resize((width, height), Resampling.BICUBIC))


def _channels_first(tiles_NSS3: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tiles_NSS3.transpose(0, 3, 1, 2))
