"""`Section`: the bytes of one image, a whole file or a part of one (a member of a tar archive), read without a copy."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

from mmdata.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO")
"""Formats that are read, by Pillow's names; a side table stores a format as its place here. MPO is a camera's JPEG."""


class Section(io.RawIOBase):
    """Bytes `begin` to `begin + size` of an open file, as a file of their own.

    Args:
        file: open for reading; closed with the section.
        begin: the first byte.
        size: bytes.
    """

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte of the section."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Place in the section, in bytes."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] (typeshed names a private type)
        """Fill a buffer from the place at hand on, as far as the section goes."""
        room = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._file.fileno(), room, self._begin + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def open_section(path: str | Path, begin: int = 0, size: int | None = None) -> io.BufferedReader:
    """Open a part of a file, or all of it.

    Raises:
        OSError: the file cannot be read, or is none: a pipe would be waited for, for ever.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the section)
    whole = os.fstat(file.fileno()).st_size
    section = Section(file, begin, whole - begin if size is None else size)  # type: ignore[arg-type]
    return io.BufferedReader(section, 1 << 16)


def need_pillow() -> None:
    """Refuse to go on without Pillow.

    Raises:
        DataError: it is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise DataError('images need Pillow, which is not installed: pip install "mmtrain[vision]"') from None
