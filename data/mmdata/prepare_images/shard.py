"""One shard: records in, tokens, labels and images out. Worker processes run this file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from mmdata.corpus.writer import fsync
from mmdata.images.grid import TileRules
from mmdata.images.place import FORMATS
from mmdata.images.table import IMAGE, PLACE
from mmdata.prepare.skips import Skip, SkipLog
from mmdata.prepare.sources import Piece
from mmdata.prepare_images.encode import EncodedDocument, SampleEncoder
from mmdata.prepare_images.records import FilePlace, read_records
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import load_tokenizer

FACTS = ("tokens", "known_by", "text_bytes", "half", "images")  # of a document, uint64 each


@dataclass(frozen=True)
class ImageShardTask:
    """A shard to be made: its number, the pieces it reads, the folder it goes to, and how records become tokens."""

    number: int
    pieces: tuple[Piece, ...]
    folder: str
    tokenizer: str
    tokenizer_hash: str
    dtype: str
    image_id: int
    images: str | None
    template: Template
    rules: TileRules
    check_pixels: bool
    caption_tokens: int | None = None

    @property
    def weight(self) -> int:
        """Rough size of the input in bytes."""
        return sum(piece.weight for piece in self.pieces)


@dataclass(frozen=True)
class ImageShard:
    """A finished shard.

    Attributes:
        tokens: dtype[n].
        learned: bool[n].
        facts: uint64[documents, 5], columns as `FACTS` names them.
        places: PLACE[m], of all documents in order; `first` is in the shard's tokens, `image` in its images.
        images: IMAGE[k]; `file` is a number of `paths`.
        paths: of the files, absolute.
        skips: records left out.
    """

    tokens: np.ndarray
    learned: np.ndarray
    facts: np.ndarray
    places: np.ndarray
    images: np.ndarray
    paths: list[str]
    skips: SkipLog


def make_image_shard(task: ImageShardTask) -> int:
    """Make a shard; return its weight. The `.json` file is renamed into place last (see `make_shard`)."""
    base = Path(task.folder) / f"{task.number:06d}"
    encoder = _cached_encoder(task.tokenizer, task.tokenizer_hash, task.template, task.rules, task.image_id,
                              task.check_pixels, task.caption_tokens)  # fmt: skip
    made, skips, done = _Documents(), SkipLog(), 0
    with open(f"{base}.seen", "wb") as seen:
        for piece in task.pieces:
            for item in read_records(piece, task.images):
                found = item if isinstance(item, Skip) else encoder.encode(item)
                if isinstance(found, Skip):
                    skips.add(found)
                else:
                    made.add(found)
            done += piece.weight
            seen.truncate(done)
    made.write(base, np.dtype(task.dtype))
    meta = {"tokens": made.num_tokens, "skips": skips.dump(), "paths": list(made.paths)}
    Path(f"{base}.json.tmp").write_text(json.dumps(meta), encoding="utf-8")
    for suffix in (".bin", ".npz", ".json"):
        fsync(Path(f"{base}{suffix}.tmp"))
        os.replace(f"{base}{suffix}.tmp", f"{base}{suffix}")
    Path(f"{base}.seen").unlink()
    return task.weight


def open_image_shard(task: ImageShardTask) -> ImageShard:
    """Read a finished shard."""
    base = Path(task.folder) / f"{task.number:06d}"
    meta = json.loads(Path(f"{base}.json").read_text(encoding="utf-8"))
    with np.load(f"{base}.npz") as arrays:
        learned = np.unpackbits(arrays["learned"], count=meta["tokens"]).astype(np.bool_)
        facts, places, images = arrays["facts"], arrays["places"], arrays["images"]
    dtype = np.dtype(task.dtype)
    tokens = np.asarray(np.memmap(f"{base}.bin", dtype=dtype, mode="r")) if meta["tokens"] else np.empty(0, dtype)
    return ImageShard(tokens, learned, facts, places, images, meta["paths"], SkipLog.load(meta["skips"]))


class _Documents:
    """Documents of a shard, in memory: a shard is of 64 MB of records at most, unless one file cannot be cut."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.paths: dict[str, int] = {}
        self._tokens: list[np.ndarray] = []
        self._learned: list[np.ndarray] = []
        self._facts: list[tuple[int, ...]] = []
        self._places: list[tuple[int, int, int]] = []
        self._numbers: dict[FilePlace, int] = {}
        self._images: list[tuple[int, ...]] = []

    def add(self, document: EncodedDocument) -> None:
        """Take the next document."""
        for image, first in document.images:
            if image.place not in self._numbers:
                header, place = image.header, image.place
                file = self.paths.setdefault(place.path, len(self.paths))
                self._numbers[place] = len(self._images)
                self._images.append((file, place.begin, place.size or 0, header.width, header.height,
                                     FORMATS.index(header.format), header.turn))  # fmt: skip
            self._places.append((self._numbers[image.place], self.num_tokens + first, image.tokens))
        self._facts.append((len(document.tokens), document.known_by, document.text_bytes, document.half,
                            len(document.images)))  # fmt: skip
        self._tokens.append(document.tokens)
        self._learned.append(document.learned)
        self.num_tokens += len(document.tokens)

    def write(self, base: Path, dtype: np.dtype) -> None:
        """Write `BASE.bin.tmp` and `BASE.npz.tmp`."""
        with open(f"{base}.bin.tmp", "wb") as stream:
            for tokens in self._tokens:
                tokens.astype(dtype).tofile(stream)
        learned = np.concatenate(self._learned) if self._learned else np.empty(0, dtype=np.bool_)
        with open(f"{base}.npz.tmp", "wb") as stream:
            np.savez(
                stream,
                learned=np.packbits(learned),
                facts=np.array(self._facts, dtype=np.uint64).reshape(-1, len(FACTS)),
                places=np.array(self._places, dtype=PLACE),
                images=np.array(self._images, dtype=IMAGE),
            )


@lru_cache(maxsize=1)
def _cached_encoder(
    path: str,
    content_hash: str,
    template: Template,
    rules: TileRules,
    image_id: int,
    check_pixels: bool,
    caption_tokens: int | None,
) -> SampleEncoder:
    """One encoder for all shards of a worker."""
    return SampleEncoder(load_tokenizer(path), template, rules, image_id, check_pixels, caption_tokens)
