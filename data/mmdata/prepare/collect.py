"""From the user's paths to a fixed list of shards, each the work that one worker does in one go.

The list depends on the files alone, never on the number of workers, so any run of one request makes the same shards.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdata.errors import DataError
from mmdata.prepare.sources import Piece, Skip, kind_of

MIN_SHARD, MAX_SHARD = 1 << 19, 1 << 26  # bytes of text in a shard, about
_SHARDS = 256  # shards aimed at, between those limits
_PACKED_WEIGHT = 3  # bytes of text behind a byte of gzip, zstd or Parquet, about


@dataclass(frozen=True)
class Source:
    """One input file: absolute path, kind (see `Piece`), size in bytes and modification time in nanoseconds."""

    path: str
    kind: str
    size: int
    mtime_ns: int


def collect(
    inputs: Sequence[Path], suffixes: Sequence[str] = (), exclude: Path | None = None
) -> tuple[list[Source], list[Skip]]:
    """Files named by `inputs` or found below its folders, sorted by path, each once; and the files passed over.

    In folders, hidden entries and `__pycache__` are ignored, and only known suffixes (or, when given, those in
    `suffixes`) are taken. A file named outright is always taken, as plain text if its suffix says nothing.
    `exclude` is a folder left out (the output, should it lie below an input).

    Raises:
        DataError: an input does not exist.
    """
    found: dict[str, Source] = {}
    skips: list[Skip] = []
    for given in inputs:
        if given.is_dir():
            for path in _walk(given, exclude):
                kind = _kind_in_folder(path, suffixes)
                if kind is None:
                    skips.append(Skip("other suffix", str(path)))
                else:
                    _add(found, skips, path, kind)
        elif given.exists():
            _add(found, skips, given, kind_of(given) or "text")
        else:
            raise DataError(f"--input {given} does not exist: give files or folders of text, .jsonl or .parquet")
    return [found[key] for key in sorted(found)], sorted(set(skips))


def plan_shards(sources: Sequence[Source]) -> list[list[Piece]]:
    """Pieces of all files in order, grouped into shards of 0.5 to 64 MB of text; big files are cut where they can be.

    Plain JSON lines are cut at lines and Parquet at row groups; text, gzip and zstd files stay whole.
    """
    total = sum(source.size * (1 if source.kind in ("text", "jsonl") else _PACKED_WEIGHT) for source in sources)
    limit = min(max(total // _SHARDS, MIN_SHARD), MAX_SHARD)
    shards: list[list[Piece]] = []
    room = 0
    for source in sources:
        for piece in _pieces(source, limit):
            if room <= 0:
                shards.append([])
                room = limit
            shards[-1].append(piece)
            room -= max(piece.weight, 1)
    return shards


def _walk(folder: Path, exclude: Path | None) -> list[Path]:
    paths: list[Path] = []
    excluded = exclude.resolve() if exclude is not None else None
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = [f for f in folders if f[0] != "." and f != "__pycache__" and (here / f).resolve() != excluded]
        paths += [here / name for name in names if name[0] != "."]
    return paths


def _kind_in_folder(path: Path, suffixes: Sequence[str]) -> str | None:
    if suffixes:
        return (kind_of(path) or "text") if path.name.endswith(tuple(suffixes)) else None
    return kind_of(path)


def _add(found: dict[str, Source], skips: list[Skip], path: Path, kind: str) -> None:
    try:
        status = path.stat()
        if not path.is_file():
            raise OSError("not a regular file")
    except OSError:  # a dangling link, a pipe, a file that has just gone
        skips.append(Skip("unreadable", str(path)))
        return
    absolute = os.path.abspath(path)
    found[absolute] = Source(absolute, kind, status.st_size, status.st_mtime_ns)


def _pieces(source: Source, limit: int) -> list[Piece]:
    if source.kind == "jsonl":
        count = max(1, -(-source.size // limit))
        cuts = [source.size * i // count for i in range(count + 1)]
        return [Piece(source.path, "jsonl", a, b, b - a) for a, b in itertools.pairwise(cuts)]
    if source.kind == "parquet":
        return _parquet_pieces(source, limit)
    weight = source.size * (1 if source.kind == "text" else _PACKED_WEIGHT)
    return [Piece(source.path, source.kind, weight=weight)]


def _parquet_pieces(source: Source, limit: int) -> list[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        groups = pq.read_metadata(source.path).num_row_groups
    except (pa.ArrowException, OSError):
        groups = 0  # reading it will say what is wrong
    weight = source.size * _PACKED_WEIGHT
    if groups == 0:
        return [Piece(source.path, "parquet", 0, 0, weight)]
    step = max(1, groups * limit // max(weight, 1))
    return [
        Piece(source.path, "parquet", a, min(a + step, groups), weight * (min(a + step, groups) - a) // groups)
        for a in range(0, groups, step)
    ]
