"""From the user's paths to a fixed list of shards, each the work that one worker does in one go.

The list depends on the files alone, never on the number of workers, so any run of one request makes the same shards.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdata.errors import DataError
from mmdata.prepare.folders import find_files
from mmdata.prepare.kinds import Kind, kind_given, kind_in_folder
from mmdata.prepare.parquet import row_groups
from mmdata.prepare.skips import Skip
from mmdata.prepare.sources import Piece
from mmdata.prepare.streams import is_wide, packing_of

MIN_SHARD, MAX_SHARD = 1 << 19, 1 << 26  # bytes of text in a shard, about
_SHARDS = 256  # shards aimed at, between those limits
_PACKED_WEIGHT = 3  # bytes of text behind a byte of gzip, zstd or Parquet, about


@dataclass(frozen=True)
class Source:
    """One input file: absolute path, kind and packing (see `Piece`), bytes, modification time in nanoseconds."""

    path: str
    kind: str
    size: int
    mtime_ns: int
    packed: str = ""


def collect(
    inputs: Sequence[Path], suffixes: Sequence[str] = (), exclude: Path | None = None
) -> tuple[list[Source], list[Skip]]:
    """Files named by `inputs` or found below its folders, sorted by path, each once; and all that was passed over.

    In folders only known suffixes (or, when given, those in `suffixes`, in letters of either case) are taken. A file
    named outright is always taken, as plain text if neither its suffix nor its content says anything, but for archives
    and tables. `exclude` is a folder left out (the output, should it lie below an input).

    Raises:
        DataError: an input does not exist.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes)
    kinds: dict[str, Kind | None] = {}
    folders = [given for given in inputs if os.path.isdir(given)]
    for given in inputs:
        if not os.path.exists(given):
            raise DataError(f"--input {given} does not exist: give files or folders of text, .jsonl or .parquet")
        if given not in folders:
            kinds[os.path.abspath(given)] = kind_given(given, wanted) if os.path.isfile(given) else None
    files, skips = find_files(folders, exclude)
    for path in files:
        if path not in kinds:
            kinds[path] = kind_in_folder(Path(path), wanted)
    found: dict[str, Source] = {}
    for path in sorted(kinds, key=lambda path: (os.path.islink(path), path)):  # of two names the one that is no link
        kind = kinds[path]
        if not isinstance(source := _source(path, kind), Source):
            skips.append(source)
        elif (real := os.path.realpath(path)) in found:
            skips.append(Skip("another name of a file that is read", path))
        else:
            found[real] = source
    return sorted(found.values(), key=lambda source: source.path), sorted(set(skips))


def plan_shards(sources: Sequence[Source], separated: bool = False) -> list[list[Piece]]:
    """Pieces of all files in order, grouped into shards of 0.5 to 64 MB of text; big files are cut where they can be.

    Plain JSON lines are cut at lines, Parquet at row groups, and plain text between documents where there is a
    separator (`separated`); packed files, JSON of other layouts and text that is one document stay whole.
    """
    total = sum(_weight(source) for source in sources)
    limit = min(max(total // _SHARDS, MIN_SHARD), MAX_SHARD)
    shards: list[list[Piece]] = []
    room = 0
    for source in sources:
        for piece in _pieces(source, limit, separated):
            if room <= 0:
                shards.append([])
                room = limit
            shards[-1].append(piece)
            room -= max(piece.weight, 1)
    return shards


def _source(path: str, kind: Kind | None) -> Source | Skip:
    try:
        status = os.stat(path)
    except OSError as error:
        return Skip("broken link" if os.path.islink(path) else "unreadable", f"{path} ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        return Skip("not a regular file", path)  # a pipe, a socket, a device
    if kind is None:
        return Skip("other suffix", path)
    if not kind.is_read:
        return Skip(kind.name, path)
    return Source(path, kind.name, status.st_size, status.st_mtime_ns, kind.packed)


def _weight(source: Source) -> int:
    return source.size * (_PACKED_WEIGHT if source.packed or source.kind == "parquet" else 1)


def _pieces(source: Source, limit: int, separated: bool) -> list[Piece]:
    if source.kind == "parquet":
        return _parquet_pieces(source, limit)
    if source.packed or source.kind == "json" or (source.kind == "text" and not (separated and _is_cut(source, limit))):
        return [Piece(source.path, source.kind, weight=_weight(source), packed=source.packed)]
    count = max(1, -(-source.size // limit))
    cuts = [source.size * i // count for i in range(count + 1)]
    return [Piece(source.path, source.kind, a, b, b - a) for a, b in itertools.pairwise(cuts)]


def _is_cut(source: Source, limit: int) -> bool:
    """Whether a text file is large enough to be cut, and its documents can be told by its bytes as they are."""
    try:
        return source.size > limit and not is_wide(source.path) and not packing_of(Path(source.path))
    except OSError:
        return False


def _parquet_pieces(source: Source, limit: int) -> list[Piece]:
    groups, weight = row_groups(source.path), _weight(source)
    if groups == 0:  # reading it will say what is wrong
        return [Piece(source.path, "parquet", 0, 0, weight)]
    step = max(1, groups * limit // max(weight, 1))
    return [
        Piece(source.path, "parquet", a, min(a + step, groups), weight * (min(a + step, groups) - a) // groups)
        for a in range(0, groups, step)
    ]
