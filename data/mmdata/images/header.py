"""Size and format of an image from its first bytes, without decoding a pixel, and what makes an image a bad one.

The size is the one after the turn that EXIF data ask for: cameras store pictures as the sensor lies and note how to
hold them. A file's header also says how much memory its pixels would take, so a decompression bomb is refused here.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from mmdata.images.place import FORMATS

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 26  # 192 MiB as RGB; below the 89M from which on Pillow itself warns
MAX_SIDE = 1 << 20  # resizing takes 32 bytes a pixel of a side, whatever the other one: 2 GB of one of 64M
REASONS = (
    "missing", "unreadable", "not an image", "too many pixels", "too long", "truncated", "broken", "broken header",
    "size changed", "floating-point pixels",
)  # fmt: skip
"""Why an image is a bad one, in the few words that they are counted by."""

_ORIENTATION = 0x0112  # EXIF's tag: 1 to 8, above 4 with the sides exchanged
_MISSING = {errno.ENOENT, errno.ENOTDIR}


class BadImage(Exception):
    """An image that cannot be used.

    Attributes:
        reason: one of REASONS, to count by.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of an image say.

    Attributes:
        width, height: in pixels, after the turn.
        format: a name of `FORMATS`.
        turn: EXIF's orientation, 1 (none) to 8, which decoding has yet to apply.
    """

    width: int
    height: int
    format: str
    turn: int = 1


def open_image(stream: BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, ImageHeader]:
    """Open an image, its pixels not decoded yet, and tell its header.

    Args:
        stream: the image's bytes, seekable.
        max_pixels: width x height at most.

    Raises:
        BadImage: it is no image of a format that is read, its header is broken, it has more pixels, or a side of more
            than MAX_SIDE.
    """
    from PIL import Image

    try:
        image = Image.open(stream, formats=FORMATS[:-1])
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage("too many pixels")
        if max(width, height) > MAX_SIDE:
            raise BadImage("too long")
        turn = _turn(image)
    except Exception as error:  # Pillow's readers raise a dozen types
        raise BadImage(reason_of(error, "broken header")) from None
    if turn > 4:
        width, height = height, width
    return image, ImageHeader(width, height, str(image.format), turn)


def read_header(stream: BinaryIO, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Return the header of an image (see :func:`open_image`).

    Raises:
        BadImage: as `open_image`.
    """
    return open_image(stream, max_pixels)[1]


def reason_of(error: Exception, otherwise: str) -> str:
    """Return the one of REASONS for what opening or decoding an image raised."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, BadImage):
        return error.reason
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.errno is not None:
        return "missing" if error.errno in _MISSING else "unreadable"
    return "truncated" if "truncated" in str(error).lower() else otherwise


def _turn(image: Image.Image) -> int:
    """EXIF's orientation of an image, from what lies before its pixels."""
    # A TIFF is turned by Pillow itself, size included. PNG's data may stand behind the pixels, which Pillow would have
    # to decode to look: there they are left alone, now and when the pixels are decoded.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    turn = image.getexif().get(_ORIENTATION, 1)
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1
