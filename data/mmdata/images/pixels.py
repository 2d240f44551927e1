"""An image's pixels as tiles: decoded, turned, on white, resized into its grid, cut. A pure function of the file.

Letters in shapes: T tiles, C colours (red, green, blue), H and W pixels of a tile's sides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mmdata.images.grid import ImageLayout, TileRules, lay_image
from mmdata.images.header import MAX_PIXELS, BadImage, open_image, reason_of

if TYPE_CHECKING:
    from PIL import Image

GREY = 128  # of an image whose pixels cannot be had: about the mean of all images
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def decode_tiles(
    stream: BinaryIO, width: int, height: int, rules: TileRules, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode an image into tiles, uint8 [T, C, H, W]: the thumbnail, then the grid's, row by row.

    The image is resized (bicubic, as LLaVA-NeXT does) to fit the grid, in its middle, on black; the thumbnail is the
    whole image stretched to a square. A JPEG of twice the size needed or more is decoded at half, a quarter or an
    eighth of it, which takes a fraction of the time and memory. Animations give their first frame, transparent parts
    are white, 16-bit values lose their lower byte.

    Args:
        stream: the image's bytes, seekable.
        width, height: what its tokens were counted by.
        rules: how images become tiles.
        max_pixels: width x height at most.

    Raises:
        BadImage: it cannot be decoded, or is of another size.
    """
    from PIL import Image

    image, header = open_image(stream, max_pixels)
    if (header.width, header.height) != (width, height):
        raise BadImage("size changed")
    layout = lay_image(width, height, rules)
    size = resized(width, height, layout, rules)
    try:
        widest = (max(size[0], rules.tile), max(size[1], rules.tile))
        image.draft("RGB", widest[::-1] if header.turn > 4 else widest)  # only JPEG heeds it
        picture = _turned(_on_white(image), header.turn)
        thumbnail = picture.resize((rules.tile, rules.tile), Image.Resampling.BICUBIC)
        inner = picture.resize(size, Image.Resampling.BICUBIC) if layout.grid[0] else None
    except Exception as error:  # Pillow's decoders raise a dozen types
        raise BadImage(reason_of(error, "broken")) from None
    return _cut(np.asarray(thumbnail), None if inner is None else np.asarray(inner), layout, rules)


def grey_tiles(width: int, height: int, rules: TileRules) -> np.ndarray:
    """Tiles of an image whose pixels cannot be had, uint8 [T, C, H, W], all of one grey."""
    return np.full((lay_image(width, height, rules).tiles, 3, rules.tile, rules.tile), GREY, dtype=np.uint8)


def resized(width: int, height: int, layout: ImageLayout, rules: TileRules) -> tuple[int, int]:
    """Size (width, height) of an image within its grid: as large as fits, of its own proportions, at least a pixel."""
    if not layout.grid[0]:
        return rules.tile, rules.tile
    full = (layout.grid[1] * rules.tile, layout.grid[0] * rules.tile)
    across, down = full[0] / width, full[1] / height  # in float64 as LLaVA-NeXT: a rounding may add a pixel
    if across < down:
        return full[0], min(math.ceil(height * across), full[1])
    return min(math.ceil(width * down), full[0]), full[1]


def _cut(thumbnail: np.ndarray, inner: np.ndarray | None, layout: ImageLayout, rules: TileRules) -> np.ndarray:
    """Tiles of a thumbnail [H, W, C] and of the resized image, which is put in the middle of its grid."""
    tiles = np.empty((layout.tiles, 3, rules.tile, rules.tile), dtype=np.uint8)
    tiles[0] = thumbnail.transpose(2, 0, 1)
    if inner is not None:
        rows, columns = layout.grid
        canvas = np.zeros((rows * rules.tile, columns * rules.tile, 3), dtype=np.uint8)
        top, left = (canvas.shape[0] - inner.shape[0]) // 2, (canvas.shape[1] - inner.shape[1]) // 2
        canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        cells = canvas.reshape(rows, rules.tile, columns, rules.tile, 3)
        tiles[1:] = cells.transpose(0, 2, 4, 1, 3).reshape(-1, 3, rules.tile, rules.tile)
    return tiles


def _on_white(image: Image.Image) -> Image.Image:
    """The first frame as RGB; what is transparent is white."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits and more: convert() would clip them at 255
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("floating-point pixels")
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _turned(image: Image.Image, turn: int) -> Image.Image:
    """The image as EXIF's orientation says it is to be held."""
    from PIL import Image

    how = Image.Transpose
    steps = {2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE,
             6: how.ROTATE_270, 7: how.TRANSVERSE, 8: how.ROTATE_90}  # fmt: skip
    return image.transpose(steps[turn]) if turn in steps else image
