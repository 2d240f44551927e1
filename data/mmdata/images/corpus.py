"""`ImageCorpus`: a prepared corpus whose documents hold images, and its `CorpusFormat`."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.fingerprint import file_facts
from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.manifest import NAME, read_manifest
from mmdata.corpus.prepared import PreparedFormat
from mmdata.errors import DataError
from mmdata.images.grid import TileRules
from mmdata.images.table import PLACE, SHARED, ImageTable, load_table, side_names


class ImageCorpus(IndexedCorpus):
    """`Corpus` of a `.bin/.idx` pair with side tables of images (`mmdata.images.table`).

    Attributes:
        table: the images, of all splits.
        places: PLACE[n], where images stand in `data`, in order.
        halves: int32[num_documents], where the second half of a preference pair begins, 0 in other documents.
        rules: how images become tiles; they decide the number of tokens, so they are the corpus's own.
        image_id: token that stands for a patch or newline of an image.

    Raises:
        DataError: a file is missing, truncated or corrupt.
    """

    def __init__(self, prefix: str | Path, cache: ArrayCache | None = None) -> None:
        super().__init__(prefix, cache)
        folder, (places, labels, halves) = self.prefix.parent, side_names(self.prefix.name)
        facts = read_manifest(folder).images
        if facts is None:
            raise DataError(f"{folder / NAME} says nothing of images: prepare it with launch/prepare_images.py")
        self.image_id = int(facts["token"])
        self.rules = rules_of(facts)
        self.table = ImageTable(folder)
        self.places = load_table(folder / places, PLACE)
        self.halves = load_table(folder / halves, np.dtype("<i4"))
        self._labels = self._map_labels(folder / labels)
        if len(self.halves) != self.num_documents:
            raise DataError(f"{folder / halves} is of {len(self.halves)} documents, not {self.num_documents}")

    def is_label(self, index: np.ndarray) -> np.ndarray:
        """Whether the tokens at positions `index` (int64[n]) of `data` are to be learned, bool[n]."""
        return (self._labels[index >> 3] >> (7 - (index & 7)).astype(np.uint8) & 1).astype(np.bool_)

    def images_between(self, start: int, stop: int) -> np.ndarray:
        """Places of the images whose first token lies in `start` to `stop` of `data`: PLACE[n]."""
        first, last = np.searchsorted(self.places["first"], [start, stop])
        return self.places[first:last]

    def documents_of(self, tokens: np.ndarray) -> np.ndarray:
        """Documents that hold the positions `tokens` of `data`, int64[n]."""
        return np.searchsorted(self.doc_offsets + self.doc_lengths, tokens, side="right")

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a later launch knows these files again, the side tables too; not the images' own files."""
        found = super().fingerprint()
        own = dict(zip(("places", "labels", "halves"), side_names(self.prefix.name), strict=True))
        names = {"images": SHARED[0], **own}
        return found | {"files": found["files"] | {k: file_facts(self.prefix.parent / n) for k, n in names.items()}}

    def _map_labels(self, path: Path) -> np.ndarray:
        expected = -(-self.num_tokens // 8)
        size = path.stat().st_size if path.is_file() else -1
        if size != expected:
            raise self._corrupt(path, "it is missing" if size < 0 else f"it has {size} bytes, not {expected}")
        return np.asarray(np.memmap(path, np.uint8, "r")) if expected else np.empty(0, np.uint8)


class ImageFormat(PreparedFormat):
    """`CorpusFormat` of a folder made by launch/prepare_images.py."""

    def matches(self, source: str) -> bool:
        """Whether `source` is a folder with a table of images."""
        return Path(source, SHARED[0]).is_file()

    def train(self, source: str, cache: ArrayCache | None = None) -> ImageCorpus:
        """`train` of the folder.

        Raises:
            DataError: a file is missing, truncated or corrupt, or (of a sample) a file of images is gone.
        """
        corpus = ImageCorpus(Path(source, "train"), cache)
        corpus.table.check_files()
        return corpus

    def valid(self, source: str, cache: ArrayCache | None = None) -> ImageCorpus | None:
        """`valid` of the folder, or None if nothing was held out."""
        return ImageCorpus(Path(source, "valid"), cache) if Path(source, "valid.idx").is_file() else None


def facts_of(rules: TileRules) -> dict[str, Any]:
    """Rules as JSON."""
    return {**asdict(rules), "grids": [list(grid) for grid in rules.grids]}


def rules_of(facts: dict[str, Any]) -> TileRules:
    """Rules that `facts_of` wrote, among other facts."""
    given = {one.name: facts[one.name] for one in fields(TileRules)}
    return TileRules(**{**given, "grids": tuple((rows, columns) for rows, columns in facts["grids"])})
