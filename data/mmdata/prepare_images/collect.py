"""From the user's paths to the files of records among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmdata.errors import DataError
from mmdata.prepare.collect import Source
from mmdata.prepare.folders import find_files
from mmdata.prepare.kinds import Kind, kind_by_name, settled
from mmdata.prepare.skips import Skip


def collect_records(inputs: Sequence[Path], exclude: Path | None = None) -> tuple[list[Source], list[Skip]]:
    """Files of records named by `inputs` or found below its folders, sorted by path; and what was passed over.

    Below folders, `.jsonl`, `.ndjson`, `.json` (packed or not) and `.tar` are taken; images, which lie there too, are
    passed over without a word.

    Raises:
        DataError: an input does not exist, or is named outright and no file of records.
    """
    folders = [given for given in inputs if given.is_dir()]
    found: dict[str, Source] = {}
    for given in inputs:
        if not given.exists():
            raise DataError(f"--input {given} does not exist: give files or folders of .jsonl, .json or .tar")
        if given not in folders:
            kind = _kind(given)
            if kind is None:
                raise DataError(f"--input {given} is no file of records: give .jsonl, .json or .tar (not compressed)")
            _take(found, os.path.abspath(given), kind)
    files, skips = find_files(folders, exclude)
    for path in files:
        kind = _kind(Path(path))
        if kind is not None:
            _take(found, path, kind)
        elif (packed := kind_by_name(Path(path))) is not None and packed.name == "archive":
            skips.append(Skip("archive", path))
    return sorted(found.values(), key=lambda source: source.path), sorted(set(skips))


def _kind(path: Path) -> Kind | None:
    """Kind of a file of records: "tar", "json" or "jsonl"; None if it is none."""
    if path.suffix.lower() == ".tar":
        return Kind("tar")
    kind = kind_by_name(path)
    return settled(path, kind) if kind is not None and kind.name == "json" else None


def _take(found: dict[str, Source], path: str, kind: Kind) -> None:
    status = os.stat(path)
    real = os.path.realpath(path)
    if real not in found:
        found[real] = Source(path, kind.name, status.st_size, status.st_mtime_ns, kind.packed)
