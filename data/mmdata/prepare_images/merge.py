"""Merging of finished shards into `train` and `valid` with their side tables, in shard order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.corpus.manifest import SplitInfo, sha256_file
from mmdata.corpus.split import held_out
from mmdata.corpus.writer import CorpusWriter
from mmdata.errors import DataError
from mmdata.images.place import FORMATS
from mmdata.images.table import IMAGE, PLACE, SHARED, side_names, write_paths
from mmdata.prepare.skips import SkipLog
from mmdata.prepare_images.shard import ImageShard, ImageShardTask, open_image_shard

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Merged:
    """What was written: facts of the splits and of the images, and what was left out."""

    splits: dict[str, SplitInfo]
    images: dict[str, Any]
    skips: SkipLog


def merge_image_shards(
    tasks: Sequence[ImageShardTask], folder: Path, home: Path, dtype: np.dtype, valid_fraction: float
) -> Merged:
    """Write the splits and tables of all shards into `folder`.

    Args:
        tasks: finished.
        folder: to write to.
        home: folder that the corpus will be in; paths of images below its parent are written relative to it.
        dtype: of tokens.
        valid_fraction: share of the tokens to hold out.

    Raises:
        DataError: there is no document at all.
    """
    skips, known, sizes = SkipLog(), [], []
    for task in tasks:
        shard = open_image_shard(task)
        skips.merge(shard.skips)
        sizes.append(shard.facts[:, 0])
        known.append(shard.facts[:, 1])
    hashes = np.concatenate(known)
    if len(hashes) == 0:
        raise DataError(f"the corpus is empty: no usable record in --input ({skips.reasons() or 'nothing was read'})")
    valid = held_out(hashes, np.concatenate(sizes), valid_fraction)
    names = SPLITS[: 2 if valid.any() else 1]
    paths: dict[str, int] = {}
    images, document = [], 0
    with ExitStack() as stack:
        writers = {name: stack.enter_context(_SplitWriter(folder, name, dtype)) for name in names}
        for task in tasks:
            shard = open_image_shard(task)
            files = np.array([paths.setdefault(path, len(paths)) for path in shard.paths], dtype=np.int64)
            table = shard.images.copy()
            table["file"] = files[table["file"]] if len(table) else 0
            _hand_out(shard, sum(map(len, images)), valid[document:], writers)
            images.append(table)
            document += len(shard.facts)
    table = np.concatenate(images) if images else np.empty(0, IMAGE)
    np.save(folder / SHARED[0], table)
    write_paths(folder, [_from(home, path) for path in paths])
    shared = {name: _file_facts(folder / name) for name in SHARED}
    splits = {name: writer.info() for name, writer in writers.items()}
    splits["train"].files |= shared
    placed = sum(writer.image_tokens for writer in writers.values())
    return Merged(splits, _image_facts(table, len(paths), placed), skips)


def _hand_out(shard: ImageShard, images: int, valid: np.ndarray, writers: dict[str, _SplitWriter]) -> None:
    """Give each document of a shard to its split; `images` is the number of the shard's first image."""
    token = place = 0
    for i, (tokens, _, text_bytes, half, count) in enumerate(shard.facts.tolist()):
        own = shard.places[place : place + count].copy()
        own["first"] -= token
        own["image"] += images
        end = token + tokens
        writers[SPLITS[int(valid[i])]].add(shard.tokens[token:end], shard.learned[token:end], own, half, text_bytes)
        token, place = end, place + count


class _SplitWriter:
    """Writer of one split and its side tables; a context manager."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self._folder, self._name = folder, name
        self._corpus = CorpusWriter(folder / name, dtype)
        self._labels = open(folder / side_names(name)[1], "wb")  # noqa: SIM115 (closed at exit)
        self._bits: list[np.ndarray] = []
        self._places: list[np.ndarray] = []
        self._halves: list[int] = []
        self._tokens = self._largest = self._bytes = self._held = self.image_tokens = 0

    def __enter__(self) -> _SplitWriter:
        self._corpus.__enter__()
        return self

    def add(self, tokens: np.ndarray, learned: np.ndarray, places: np.ndarray, half: int, text_bytes: int) -> None:
        """Append a document; `places` count from its first token."""
        self._corpus.add(tokens)
        places["first"] += self._tokens
        self._places.append(places)
        self._halves.append(half)
        self._bits.append(learned)
        self._tokens += len(tokens)
        self._held += len(tokens)
        self._bytes += text_bytes
        self.image_tokens += int(places["tokens"].sum())
        self._largest = max(self._largest, int(tokens.max()))
        if self._held >= 1 << 20:
            self._write_bits(last=False)

    def _write_bits(self, last: bool) -> None:
        bits = np.concatenate(self._bits) if self._bits else np.empty(0, dtype=np.bool_)
        whole = len(bits) if last else len(bits) // 8 * 8
        np.packbits(bits[:whole]).tofile(self._labels)
        self._bits, self._held = [bits[whole:]], len(bits) - whole

    def __exit__(self, *failed: Any) -> None:
        self._corpus.__exit__(*failed)
        if failed[0] is None:
            self._write_bits(last=True)
            places, _, halves = side_names(self._name)
            table = np.concatenate(self._places) if self._places else np.empty(0, PLACE)
            np.save(self._folder / places, table.astype(PLACE))
            np.save(self._folder / halves, np.array(self._halves, dtype="<i4"))
        self._labels.close()

    def info(self) -> SplitInfo:
        """Facts for the manifest, when all is written."""
        names = [f"{self._name}.bin", f"{self._name}.idx", *side_names(self._name)]
        files = {name: _file_facts(self._folder / name) for name in names}
        return SplitInfo(len(self._halves), self._bytes, self._tokens, self._largest, files)


def _file_facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _from(home: Path, path: str) -> str:
    """A path as the corpus in `home` names it: relative if it is below the folder around, so that all may move."""
    home, found = home.resolve(), Path(path).resolve()
    return os.path.relpath(found, home) if found.is_relative_to(home.parent) and home.parent != Path("/") else path


def _image_facts(table: np.ndarray, files: int, tokens: int) -> dict[str, Any]:
    formats = Counter(FORMATS[code] for code in table["format"].tolist())
    return {
        "count": len(table),
        "files": files,
        "bytes": int(table["bytes"].sum()),
        "tokens": tokens,
        "largest": [int(table["width"].max(initial=0)), int(table["height"].max(initial=0))],
        "turned": int((table["turn"] > 1).sum()),
        "formats": dict(sorted(formats.items())),
    }
