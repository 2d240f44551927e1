"""An image's pixels as tiles: decoded, turned, on white, cut. A pure function of the file.

Letters in shapes: T tiles, C colours (red, green, blue), H and W pixels of a tile's sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mmdata.images.grid import TileRules, fitted_size, lay_image
from mmdata.images.header import MAX_PIXELS, BadImage, open_image, reason_of
from mmdata.images.tiles import cut_tiles

if TYPE_CHECKING:
    from PIL import Image

GREY = 128  # of an image whose pixels cannot be had: about the mean of all images
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def decode_tiles(
    stream: BinaryIO, width: int, height: int, rules: TileRules, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode an image into tiles, uint8 [T, C, H, W]: the thumbnail, then the grid's, row by row.

    `mmdata.images.tiles.cut_tiles` says how an image is resized and cut. A JPEG of twice the size needed or more is
    decoded at half, a quarter or an eighth of it, which takes a fraction of the time and memory. Animations give their
    first frame, transparent parts are white, 16-bit values lose their lower byte.

    Args:
        stream: the image's bytes, seekable.
        width, height: what its tokens were counted by.
        rules: how images become tiles.
        max_pixels: width x height at most.

    Raises:
        BadImage: it cannot be decoded, or is of another size.
    """
    image, header = open_image(stream, max_pixels)
    if (header.width, header.height) != (width, height):
        raise BadImage("size changed")
    try:
        needed = _needed(width, height, rules)
        image.draft("RGB", needed[::-1] if header.turn > 4 else needed)  # only JPEG heeds it
        return cut_tiles(_turned(_on_white(image), header.turn), rules, (width, height))[0]
    except Exception as error:  # Pillow's decoders raise a dozen types
        raise BadImage(reason_of(error, "broken")) from None


def grey_tiles(width: int, height: int, rules: TileRules) -> np.ndarray:
    """Tiles of an image whose pixels cannot be had, uint8 [T, C, H, W], all of one grey."""
    return np.full((lay_image(width, height, rules).tiles, 3, rules.tile, rules.tile), GREY, dtype=np.uint8)


def _needed(width: int, height: int, rules: TileRules) -> tuple[int, int]:
    """Width and height that an image must be decoded at, at least: those of its place in the grid, and a tile's."""
    inner = fitted_size(width, height, lay_image(width, height, rules), rules)
    return max(inner[0], rules.tile), max(inner[1], rules.tile)


def _on_white(image: Image.Image) -> Image.Image:
    """The first frame as RGB; what is transparent is white."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits and more: convert() would clip them at 255
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("floating-point pixels")
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy of 67M pixels is 268 MB
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
