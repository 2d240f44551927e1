"""Every kind of image that a crawl holds: its size before decoding, its pixels after, and why it is refused."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmdata.images.grid import TileRules
from mmdata.images.header import BadImage, read_header, reason_of
from mmdata.images.pixels import decode_tiles, grey_tiles
from mmdata.images.place import open_section
from tests.data.images.made import SMALL, encoded, exif, picture

FIXED = TileRules(tile=16, patch=8, grids=())


def header(data: bytes, **options) -> tuple:
    found = read_header(io.BytesIO(data), **options)
    return found.width, found.height, found.format, found.turn


def tiles(data: bytes, rules: TileRules = FIXED, **options) -> np.ndarray:
    width, height, *_ = header(data)
    return decode_tiles(io.BytesIO(data), width, height, rules, **options)


def reason(data: bytes, rules: TileRules = FIXED, size: tuple[int, int] | None = None, **options) -> str:
    with pytest.raises(BadImage) as error:
        width, height = size or header(data, **options)[:2]
        decode_tiles(io.BytesIO(data), width, height, rules, **options)
    return error.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(kind):
    data = encoded(picture(40, 24), kind)
    assert header(data) == (40, 24, kind, 1)
    near = tiles(data).astype(int) - tiles(encoded(picture(40, 24))).astype(int)
    assert np.abs(near).max() < 40  # lossy, or of 256 colours


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "PNG"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_the_image_and_its_size(turn, kind):
    data = encoded(picture(40, 24), kind, exif=exif(turn))
    size = (24, 40) if turn > 4 else (40, 24)
    assert header(data)[:2] == size
    with Image.open(io.BytesIO(data)) as image:
        from PIL import ImageOps

        right = ImageOps.exif_transpose(image).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    assert np.abs(tiles(data)[0].transpose(1, 2, 0).astype(int) - np.asarray(right)).max() <= 2


def test_modes():
    white, black = (255, 255, 255), (0, 0, 0)
    clear = Image.new("RGBA", (9, 9), (200, 0, 0, 0))
    assert tuple(tiles(encoded(clear))[0, :, 8, 8]) == white
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert tuple(tiles(encoded(palette, transparency=1))[0, :, 8, 8]) == white
    assert tuple(tiles(encoded(palette))[0, :, 8, 8]) == (10, 200, 30)
    cmyk = tiles(encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", quality=95))[0, :, 8, 8]
    assert cmyk[0] > 240 and cmyk[1:].max() < 15  # red
    deep = Image.fromarray(np.full((9, 9), 0x8040, dtype=np.uint16))
    assert deep.mode == "I;16" and (tiles(encoded(deep)) == 0x80).all()
    assert (tiles(encoded(Image.new("1", (9, 9), 0))) == 0).all()
    assert tuple(tiles(encoded(Image.new("LA", (9, 9), (0, 255))))[0, :, 8, 8]) == black
    floats = Image.fromarray(np.zeros((9, 9), dtype=np.float32))
    assert reason(encoded(floats, "TIFF")) == "floating-point pixels"


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
        assert tuple(tiles(data)[0, :, 8, 8]) == (250, 0, 0), kind


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 7)])
def test_tiny_and_long_images(size):
    for rules in (FIXED, SMALL):
        found = tiles(encoded(picture(*size)), rules)
        assert found.shape == grey_tiles(*size, rules).shape


def test_a_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same():
    data = encoded(picture(1600, 800), "JPEG", quality=95)
    small, exact = tiles(data, SMALL), tiles(encoded(picture(1600, 800)), SMALL)
    assert np.abs(small.astype(int) - exact.astype(int)).max() <= 6
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (32, 16))
        assert image.size == (200, 100)  # an eighth


def test_broken_images_are_told_apart():
    jpeg, png = encoded(picture(400, 300), "JPEG"), encoded(picture(400, 300))
    assert reason(b"", size=(1, 1)) == reason(b"hello", size=(1, 1)) == "not an image"
    assert reason(jpeg[: len(jpeg) // 2]) == reason(png[: len(png) // 2]) == "truncated"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", size=(9, 9)) == "not an image"
    damaged = bytearray(png)
    damaged[41] ^= 255  # the first byte of the deflated pixels
    assert reason(bytes(damaged)) == "broken"
    assert reason(png, size=(300, 400)) == "size changed"


def bomb(side: int) -> bytes:
    """A PNG that says it is `side` pixels wide and high, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8193, 60_000])
def test_a_bomb_is_refused_by_its_header(side, monkeypatch):
    def decoded(*args, **options):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert reason(bomb(side), size=(side, side)) == "too many pixels"
    assert header(bomb(8192))[:2] == (8192, 8192)  # as many as are allowed
    assert reason(encoded(picture(11, 10)), max_pixels=100) == "too many pixels"


def test_an_image_of_an_endless_side_is_refused_though_its_pixels_are_few():
    longest = encoded(Image.new("1", (1 << 20, 1)))
    assert header(longest)[:2] == (1 << 20, 1)
    assert tiles(longest).shape == (1, 3, 16, 16)
    for size in ((1 << 20) + 1, 1), (1, (1 << 20) + 1):
        assert reason(encoded(Image.new("1", size)), size=size) == "too long"


def pipe(path):
    os.mkfifo(path)
    os.open(path, os.O_RDWR)  # else opening it to read would wait for ever, where nothing refuses it


@pytest.mark.parametrize("make", [pipe, os.mkdir, lambda path: os.symlink(os.devnull, path)])
def test_what_is_no_regular_file_is_not_waited_for(make, tmp_path):
    make(tmp_path / "image.png")
    with pytest.raises(OSError, match="no regular file") as caught:
        open_section(tmp_path / "image.png")
    assert reason_of(caught.value, "broken") == "unreadable"


def test_a_section_is_a_file_of_its_own(tmp_path):
    data = encoded(picture(20, 10))
    (tmp_path / "many").write_bytes(b"xyz" + data + b"tail")
    with open_section(tmp_path / "many", 3, len(data)) as stream:
        assert stream.read() == data
        stream.seek(-4, 2)
        assert stream.read(100) == data[-4:]
        stream.seek(0)
        assert read_header(stream).width == 20
