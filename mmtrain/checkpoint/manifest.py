"""Manifest of a checkpoint: size and checksum of every file in it, in `manifest.json`, which is written last.

Checksums are XXH3 of 128 bits (https://github.com/Cyan4973/xxHash): they run at the speed of memory, and find every
accident. They are no signature: who can write the folder can write a manifest that fits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mmtrain.checkpoint.durable import sync_file, sync_folder, write_text
from mmtrain.checkpoint.progress import RECORD
from mmtrain.checkpoint.read_ahead import blocks_of
from mmtrain.checkpoint.tensor_index import INDEX, RANK_FILE

MANIFEST = "manifest.json"
ALGORITHM = "xxh3_128"
OLD_SUFFIX = ".distcp"  # of torch's files of tensors, before format 3
_LARGEST = 256 << 20  # bytes of a manifest: a million files take about 130 each
_CHECKSUM = re.compile(r"[0-9a-f]{32}")


class BadManifest(ValueError):
    """A `manifest.json` that is cut short, is garbage, was changed, or names files outside its checkpoint."""


@dataclass(frozen=True)
class FileSum:
    """What a manifest says of a file.

    Attributes:
        size: in bytes.
        checksum: XXH3 of 128 bits, as 32 hexadecimal digits.
    """

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """Contents of a `manifest.json`.

    Attributes:
        step: the optimizer step that the checkpoint was saved after.
        files: by their names relative to the checkpoint, with `/` between folders.
    """

    step: int
    files: Mapping[str, FileSum]


def file_sum(path: Path, told: Callable[[int], None] | None = None) -> FileSum:
    """Return size and checksum of a file of any size, of which some blocks are in memory at once.

    Args:
        path: of the file.
        told: called with the bytes of each block, for a progress bar.

    Raises:
        OSError: it cannot be read.
    """
    size, state = 0, xxhash.xxh3_128()
    for block in blocks_of(path):
        state.update(block)
        size += len(block)
        if told is not None:
            told(len(block))
    return FileSum(size, state.hexdigest())


def is_shard(name: str) -> bool:
    """Tell whether a file is one of tensors, by its name; all other files of a checkpoint are small."""
    return RANK_FILE.fullmatch(name) is not None or name.endswith(OLD_SUFFIX)


def our_files(checkpoint: Path) -> list[str]:
    """Return the names of all files in a checkpoint's folder that a load may read, but for the manifest itself.

    What else lies in the folder, a user's notes or a file system's own files, is not ours.
    """
    found = []
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        ours = len(name.parts) > 1 or name.name in (RECORD, INDEX, ".metadata") or is_shard(name.name)
        if ours and path.is_file() and not (len(name.parts) > 1 and name.name.startswith(".")):
            found.append(name.as_posix())
    return found


def write_manifest(checkpoint: Path, step: int, hashed: Mapping[str, FileSum]) -> None:
    """Write the manifest of a checkpoint that is complete but for it; what it lists is on the disk then.

    Args:
        checkpoint: folder of the checkpoint.
        step: of the checkpoint.
        hashed: the files whose writers hashed them; all others are read.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    files = dict(hashed)
    for name in our_files(checkpoint):
        if name not in files:
            sync_file(checkpoint / name)
            sync_folder((checkpoint / name).parent)
            files[name] = file_sum(checkpoint / name)
    entries = {name: {"bytes": files[name].size, ALGORITHM: files[name].checksum} for name in sorted(files)}
    made = {"step": step, "files": entries}
    write_text(checkpoint / MANIFEST, json.dumps({**made, "manifest": _own_sum(made)}, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        OSError: it is missing or cannot be read.
        BadManifest: it is not what :func:`write_manifest` wrote.
    """
    path = checkpoint / MANIFEST
    if (size := path.stat().st_size) > _LARGEST:
        raise BadManifest(f"is larger than a manifest can be: {size:,} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        made = json.loads(text if text.endswith("\n") else "")
    except (ValueError, RecursionError) as error:
        raise BadManifest("is empty, cut short or garbage") from error
    if not isinstance(made, dict) or made.pop("manifest", None) != _own_sum(made):
        raise BadManifest("was changed: it does not match its own checksum")
    files = made.get("files")
    if type(made.get("step")) is not int or not isinstance(files, dict):
        raise BadManifest("is not a checkpoint's manifest")
    return Manifest(made["step"], {name: _entry(name, entry) for name, entry in files.items()})


def _entry(name: str, entry: Any) -> FileSum:
    if not all(part.strip(".") for part in name.split("/")) or "\0" in name or "\\" in name:
        raise BadManifest(f"names a file outside the checkpoint: {name!r}")
    if isinstance(entry, dict) and type(size := entry.get("bytes")) is int and size >= 0:
        checksum = entry.get(ALGORITHM)
        if isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum):
            return FileSum(size, checksum)
    raise BadManifest(f"has no size and {ALGORITHM} checksum for {name}")


def _own_sum(made: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest's contents, so that damage in it is not laid on the files that it lists."""
    return xxhash.xxh3_128(json.dumps(made, sort_keys=True).encode()).hexdigest()
