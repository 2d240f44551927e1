"""Records of the files that image data come in: JSON of any layout with images beside it, and WebDataset tar shards.

Nothing here is fatal: what cannot be read comes out as a `Skip`, with the reason and the place.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmdata.prepare.skips import Skip
from mmdata.prepare.sources import Piece, guarded, json_records, json_value
from mmdata.prepare.streams import RECORD_LIMIT

_IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"}


class FilePlace(NamedTuple):
    """Bytes of an image: file, first byte, size; `size` None is the whole file."""

    path: str
    begin: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        where: its place, for messages.
        value: the JSON object; of a WebDataset sample without one, what its members say.
        folder: that relative paths of images are taken from; None in a tar shard, where `members` are meant.
        members: images of a WebDataset sample, by their names without the key, in the shard's order.
    """

    where: str
    value: dict[str, Any]
    folder: str | None = None
    members: dict[str, FilePlace] = field(default_factory=dict)


def read_records(piece: Piece, images: str | None) -> Iterator[Record | Skip]:
    """Records and skips of a piece ("json", "jsonl" or "tar"), in file order.

    Args:
        piece: what to read.
        images: folder that relative paths of images are taken from; None is that of the JSON file.
    """
    if piece.kind == "tar":
        yield from guarded(piece, _tar(piece))
        return
    folder = images or os.path.dirname(piece.path)

    def record(data: bytes | None, where: str, bad: str) -> Record | Skip:
        value = json_value(data, where, bad)
        if isinstance(value, Skip):
            return value
        return Record(where, value, folder) if isinstance(value, dict) else Skip("record is not an object", where)

    yield from json_records(piece, record)


def _tar(piece: Piece) -> Iterator[Record | Skip]:
    """Samples of a WebDataset shard: runs of members that share the name up to the first dot of its last part."""
    key, members, last = "", [], ""  # type: str, list[tuple[str, FilePlace]], str
    try:
        with open(piece.path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if (found := f"{folder}/{stem}") != key:
                    if members:
                        yield _sample(piece.path, key, members)
                    key, members = found, []
                members.append((suffix.lower(), FilePlace(piece.path, member.offset_data, member.size)))
                last = member.name
                archive.members = []  # tarfile remembers every member: of a shard of millions that is gigabytes
    except tarfile.TarError as error:
        yield Skip("broken tar", f"{piece.path} after {last or 'its start'} ({error})")
        return  # the sample at hand may lack members
    if members:
        yield _sample(piece.path, key, members)
    elif not key:
        yield Skip("empty", piece.path)


def _sample(path: str, key: str, members: list[tuple[str, FilePlace]]) -> Record | Skip:
    where = f"{path} {key.lstrip('/')}"
    images = {name: place for name, place in members if name.rpartition(".")[2] in _IMAGE_SUFFIXES}
    texts = {name: place for name, place in members if name in ("json", "txt")}
    value: dict[str, Any] = {}
    if "json" in texts:
        found = json_value(_bytes(texts["json"]), where, "bad JSON")
        if isinstance(found, Skip):
            return found
        if not isinstance(found, dict):
            return Skip("record is not an object", where)
        value = found
    if "txt" in texts:
        data = _bytes(texts["txt"])
        try:
            value.setdefault("caption", (data or b"").decode("utf-8").strip())
        except UnicodeDecodeError:
            return Skip("not UTF-8", where)
    if images and "image" not in value and "images" not in value and not _has_parts(value):
        value["images"] = list(images)
    return Record(where, value, None, images)


def _has_parts(value: dict[str, Any]) -> bool:
    """Whether a record names its images among its parts."""
    return any(isinstance(part, dict) and "image" in part for part in value.get("parts") or [])


def _bytes(place: FilePlace) -> bytes | None:
    size = place.size or 0
    if size > RECORD_LIMIT:
        return None
    with open(place.path, "rb") as stream:
        stream.seek(place.begin)
        return stream.read(size)


def json_text(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
