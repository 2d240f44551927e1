"""Side tables of a corpus with images, beside its `.bin/.idx` pairs.

    images.npy          every image: file, place in it, size, format (`IMAGE`)
    image_paths.bin     paths of their files, UTF-8, end to end; from the corpus folder where they are relative
    image_paths.npy     where each path begins and the last ends, int64[files + 1]
    NAME.images.npy     where images stand among the tokens of NAME.bin (`PLACE`), in order
    NAME.labels.bin     a bit for each token of NAME.bin, the highest of a byte first: whether it is learned
    NAME.halves.npy     of each document, where its second half begins: the rejected answer of a preference pair;
                        0 in a document that is no pair; int32[documents]

`NAME` is `train` or `valid`; both share the images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdata.errors import DataError

IMAGE = np.dtype([
    ("file", "<i8"), ("begin", "<i8"), ("bytes", "<i8"), ("width", "<i4"), ("height", "<i4"), ("format", "u1"),
    ("turn", "u1"),
])  # fmt: skip
"""An image: number of its file, first byte and bytes in it, size in pixels after the turn that EXIF's `turn` asks for,
place of its format in `mmdata.images.place.FORMATS`."""

PLACE = np.dtype([("image", "<i8"), ("first", "<i8"), ("tokens", "<i4")])
"""Tokens of an image in a corpus: its number, the first of its placeholders in the `.bin`, how many they are."""

SHARED = ("images.npy", "image_paths.bin", "image_paths.npy")


def side_names(split: str) -> tuple[str, str, str]:
    """Names of a split's places, labels and halves."""
    return f"{split}.images.npy", f"{split}.labels.bin", f"{split}.halves.npy"


def load_table(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a table of one of the dtypes above, read-only.

    Raises:
        DataError: the file is missing, broken or of another dtype.
    """
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DataError(f"{path} {what}: prepare the corpus again with launch/prepare_images.py") from None
    if table.dtype != dtype or table.ndim != 1:
        raise DataError(f"{path} holds {table.dtype} where {dtype} belongs: prepare the corpus again with --force")
    return table


class ImageTable:
    """Images of a corpus folder: `folder/images.npy` and the paths of their files. Pickles by path.

    Args:
        folder: of the corpus.

    Raises:
        DataError: a file is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = load_table(folder / SHARED[0], IMAGE)
        self._bounds = load_table(folder / SHARED[2], np.dtype("<i8"))
        paths = folder / SHARED[1]
        size = paths.stat().st_size if paths.is_file() else -1
        if size != self._bounds[-1]:
            raise DataError(f"{paths} has {max(size, 0)} bytes, not {self._bounds[-1]}: prepare the corpus again")
        self._paths = np.memmap(paths, np.uint8, "r") if size else np.empty(0, np.uint8)

    def __reduce__(self) -> tuple[type[ImageTable], tuple[Path]]:
        return ImageTable, (self.folder,)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_files(self) -> int:
        """Files that hold the images."""
        return len(self._bounds) - 1

    def file(self, number: int) -> Path:
        """Path of a file; a relative one is taken from the corpus folder."""
        name = bytes(self._paths[self._bounds[number] : self._bounds[number + 1]]).decode("utf-8", "surrogateescape")
        return self.folder / name

    def check_files(self, most: int = 256) -> None:
        """Look whether up to `most` of the files, spread evenly, are there and as large as their images need.

        Raises:
            DataError: one is not, with its name.
        """
        rows = np.unique(np.linspace(0, len(self.images) - 1, min(most, len(self.images))).astype(np.int64))
        for image in self.images[rows]:
            path = self.file(int(image["file"]))
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise DataError(
                    f"image file {path} of {self.folder} cannot be read ({error.strerror}): put the images back where "
                    "they lay, from the corpus folder, when it was prepared, or prepare it again"
                ) from None
            if size < image["begin"] + image["bytes"]:
                raise DataError(f"image file {path} has {size} bytes, fewer than when {self.folder} was prepared")


def write_paths(folder: Path, paths: Sequence[str]) -> None:
    """Write `image_paths.bin` and `image_paths.npy` into a folder."""
    encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
    bounds = np.zeros(len(encoded) + 1, dtype="<i8")
    np.cumsum([len(path) for path in encoded], out=bounds[1:])
    (folder / SHARED[1]).write_bytes(b"".join(encoded))
    np.save(folder / SHARED[2], bounds)
