"""Index of a checkpoint's tensors, `tensors.json`: shape and dtype of each, and the file and place of all its parts.

Parts are raw bytes of safetensors files, one a rank; values that are no tensors, the options of the optimizer's groups,
stand in the index itself. It is read as data, and nothing in it is believed before it is checked: names stay within the
folder, the parts of a tensor make it up, none twice, and no two parts share bytes of a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mmtrain.checkpoint.boxes import are_apart, spans_are_apart
from mmtrain.checkpoint.durable import write_text
from mmtrain.checkpoint.safetensors_file import DTYPES, MOST_DIMENSIONS, NAMES, BadFile, Entry, load_json

INDEX = "tensors.json"
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_LARGEST = 4 << 30  # bytes of an index: 40 million parts have less
_SMALL, _TIMES_THE_FILES = 64 << 20, 16  # bytes of an index of any files, and how often a larger one has their bytes
_MOST = 1 << 50  # elements of a tensor


class BadIndex(ValueError):
    """What is wrong with an index, as text that follows its name."""


@dataclass(frozen=True)
class Place:
    """Where a part of a tensor lies.

    Attributes:
        file: its name in the checkpoint.
        entry: its dtype, shape and first byte there.
    """

    file: str
    entry: Entry

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.entry.begin + math.prod(self.entry.shape) * DTYPES[self.entry.dtype].itemsize


@dataclass(frozen=True)
class Value:
    """What is kept of something that is not a tensor.

    Attributes:
        plain: a number, a text, a truth value, None, or lists of these.
    """

    plain: Any


def rank_file(rank: int) -> str:
    """Return the name of the file of a rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def write_index(checkpoint: Path, metadata: Metadata) -> None:
    """Write the index of what `metadata` describes; its `storage_data` are :class:`Place` and :class:`Value`.

    Raises:
        OSError: it cannot be written.
        ValueError: a value is none that JSON has.
    """
    values = {index.fqn: one.plain for index, one in metadata.storage_data.items() if isinstance(one, Value)}
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            places = (metadata.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in entry.chunks)
            parts = [
                [place.file, place.entry.begin, list(chunk.offsets), list(chunk.sizes)]
                for place, chunk in zip(places, entry.chunks, strict=True)
            ]
            tensors[name] = {"dtype": NAMES[entry.properties.dtype], "shape": list(entry.size), "parts": parts}
    lines = (f"{json.dumps(name)}: {json.dumps(one, separators=(',', ':'))}" for name, one in tensors.items())
    write_text(
        checkpoint / INDEX,
        '{"tensors": {\n' + ",\n".join(lines) + '\n}, "values": ' + json.dumps(values, allow_nan=False) + "}\n",
    )


def read_index(checkpoint: Path) -> Metadata:
    """Read the index of a checkpoint, as torch's planners of loading take it.

    Raises:
        OSError: it cannot be read.
        BadIndex: it is not what :func:`write_index` wrote.
    """
    path = checkpoint / INDEX
    size = path.stat().st_size
    if size > _LARGEST or size > max(_SMALL, _TIMES_THE_FILES * _bytes_of_files(checkpoint)):
        raise BadIndex(f"is larger than an index of these files can be: {size:,} bytes")
    try:
        index = load_json(path.read_bytes())
    except BadFile as error:
        raise BadIndex(str(error)) from None
    tensors, values = index.get("tensors"), index.get("values")
    if not isinstance(tensors, dict) or not isinstance(values, dict) or tensors.keys() & values.keys():
        raise BadIndex("is not a checkpoint's index")
    known: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {name: BytesStorageMetadata() for name in values}
    places: dict[MetadataIndex, Place | Value] = {MetadataIndex(n): Value(_plain(n, v)) for n, v in values.items()}
    for name, entry in tensors.items():
        known[name], found = _tensor(name, entry)
        places |= found
    _check_files(places.values())
    return Metadata(known, None, places, StorageMeta())


def _bytes_of_files(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir() if RANK_FILE.fullmatch(path.name))


def sizes_of(places: Iterable[Place | Value]) -> dict[str, int]:
    """Return the bytes that each file must have at least."""
    sizes: dict[str, int] = {}
    for place in places:
        if isinstance(place, Place):
            sizes[place.file] = max(sizes.get(place.file, 0), place.end)
    return sizes


def _check_files(places: Iterable[Place | Value]) -> None:
    """Refuse parts of one file that have bytes in common."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for place in places:
        if isinstance(place, Place):
            spans.setdefault(place.file, []).append((place.entry.begin, place.end))
    for file, found in spans.items():
        if not spans_are_apart(found):
            raise BadIndex(f"has parts that overlap in {file}")


def _tensor(name: str, entry: Any) -> tuple[TensorStorageMetadata, dict[MetadataIndex, Place]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "parts"}:
        raise BadIndex(f"does not say dtype, shape and parts of {name[:120]!r}")
    dtype, shape, parts = entry["dtype"], entry["shape"], entry["parts"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadIndex(f"has {name[:120]!r} in the unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or math.prod(shape) > _MOST or not isinstance(parts, list):
        raise BadIndex(f"has {name[:120]!r} with a shape or parts that cannot be")
    places: dict[MetadataIndex, Place] = {}
    chunks, elements = [], 0
    for part in parts:
        place, offsets = _part(name, dtype, shape, part)
        sizes = torch.Size(place.entry.shape)
        places[MetadataIndex(name, offsets)] = place
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), sizes))
        elements += math.prod(sizes)
    boxes = ((chunk.offsets, chunk.sizes) for chunk in chunks)
    if elements != math.prod(shape) or len(places) != len(parts) or not are_apart(boxes):
        raise BadIndex(f"has {name[:120]!r} in parts that are not the whole of it")
    return TensorStorageMetadata(TensorProperties(DTYPES[dtype]), torch.Size(shape), chunks), places


def _part(name: str, dtype: str, shape: list[int], part: Any) -> tuple[Place, list[int]]:
    if not isinstance(part, list) or len(part) != 4:
        raise BadIndex(f"has a part of {name[:120]!r} that is none")
    file, begin, offsets, sizes = part
    if not isinstance(file, str) or RANK_FILE.fullmatch(file) is None:
        raise BadIndex(f"names a file outside the checkpoint, or no file of tensors: {str(file)[:80]!r}")
    fits = _counts(offsets) and _counts(sizes) and len(offsets) == len(sizes) == len(shape)
    if not fits or any(first + count > whole for first, count, whole in zip(offsets, sizes, shape, strict=True)):
        raise BadIndex(f"has a part of {name[:120]!r} that lies outside of it")
    if type(begin) is not int or not 0 <= begin < _MOST:
        raise BadIndex(f"has a part of {name[:120]!r} at a place that cannot be")
    return Place(file, Entry(dtype, tuple(sizes), begin)), offsets


def _counts(values: Any) -> bool:
    numbers = isinstance(values, list) and len(values) <= MOST_DIMENSIONS
    return numbers and all(type(value) is int and 0 <= value < _MOST for value in values)


def _plain(name: str, value: Any) -> Any:
    """Return a value of numbers, texts, truth values and lists of these."""
    if isinstance(value, list):
        return [_plain(name, one) for one in value]
    if isinstance(value, Mapping) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadIndex(f"has {name[:120]!r} with a value that cannot be")
    return value
