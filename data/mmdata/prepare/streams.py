"""Bytes of a file as UTF-8 in pieces of bounded size: unpacked, transcoded from UTF-16 or UTF-32, cut into lines."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

CHUNK = 1 << 20  # bytes read or unpacked at a time
RECORD_LIMIT = 1 << 28  # bytes of one line or JSON value; a longer one is left out
PACKINGS = {"gz": b"\x1f\x8b\x08", "zst": b"\x28\xb5\x2f\xfd", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00"}  # first bytes
_UTF8_MARK = b"\xef\xbb\xbf"
# Byte-order marks; UTF-32's begins with UTF-16's.
_WIDE = {b"\xff\xfe\x00\x00": "utf-32-le", b"\x00\x00\xfe\xff": "utf-32-be",
         b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}  # fmt: skip


class BrokenStreamError(Exception):
    """A packed file that ends early or is not of its format."""


def head_of(path: Path, packed: str, size: int) -> bytes:
    """First bytes of a file's text, `size` of them if there are so many; fewer where the file cannot be read."""
    head = b""
    try:
        for chunk in chunks(str(path), packed):
            head += chunk
            if len(head) >= size:
                break
    except (OSError, BrokenStreamError, UnicodeDecodeError):
        pass  # reading it will say what is wrong
    return head[:size]


def packing_of(path: Path) -> str:
    """Packing that a file's first bytes show: a key of `PACKINGS`, or "" where there is none."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(8)
    except OSError:
        return ""
    return next((name for name, magic in PACKINGS.items() if head.startswith(magic)), "")


def is_wide(path: str) -> bool:
    """Whether a file starts with the byte-order mark of UTF-16 or UTF-32."""
    with open(path, "rb") as stream:
        head = stream.read(4)
    return any(head.startswith(mark) for mark in _WIDE)


def chunks(path: str, packed: str = "") -> Iterator[bytes]:
    """Text of a whole file, as UTF-8 without a byte-order mark, in chunks of about a megabyte.

    Text with the mark of UTF-16 or UTF-32 is transcoded; any other comes as it is, valid UTF-8 or not.

    Raises:
        OSError: the file cannot be read.
        BrokenStreamError: it is not of the format that `packed` names, or ends early.
        UnicodeDecodeError: it is not of the coding that its mark names.
    """
    raw = _unpacked(path, packed)
    head = b""
    for chunk in raw:
        head += chunk
        if len(head) >= 4:
            break
    for mark, coding in _WIDE.items():
        if head.startswith(mark):
            decoder = codecs.getincrementaldecoder(coding)()
            yield decoder.decode(head[len(mark) :]).encode("utf-8", "surrogatepass")
            for chunk in raw:
                yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
            yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
            return
    if head:
        yield head.removeprefix(_UTF8_MARK)
    yield from raw


def lines(pieces: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines of a stream without their ends; None for one over `RECORD_LIMIT`."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        first, *rest = piece.split(b"\n")
        size += len(first)
        if size <= RECORD_LIMIT:
            held.append(first)
        if rest:
            yield b"".join(held) if size <= RECORD_LIMIT else None
            yield from rest[:-1]
            held, size = [rest[-1]], len(rest[-1])
    if size:
        yield b"".join(held) if size <= RECORD_LIMIT else None


def _unpacked(path: str, packed: str) -> Iterator[bytes]:
    if packed == "zst":
        yield from _zstd_chunks(path)
        return
    opened = {"": open, "gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[packed]
    try:
        with opened(path, "rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file itself cannot be read
        raise BrokenStreamError(str(error)) from None


def _zstd_chunks(path: str) -> Iterator[bytes]:
    """Every frame of a file, as multi-threaded writers make several.

    `ZstdDecompressor.stream_reader` takes a truncated file for a finished one, so the frames are followed by hand. A
    small input may unpack to much, so it goes in by few bytes at a time.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, inside = decompressor.decompressobj(), False
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(CHUNK >> 4):
                while chunk:
                    yield frame.decompress(chunk)
                    inside, chunk = True, b""
                    if frame.eof:
                        chunk, inside = frame.unused_data, False
                        frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise BrokenStreamError(str(error)) from None
    if inside:
        raise BrokenStreamError("the last frame is not finished")
