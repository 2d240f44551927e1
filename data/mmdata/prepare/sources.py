"""Reading documents out of files: text and source code, JSON lines (plain, gzip, zstd) and Parquet.

Nothing here is fatal: a file or line that cannot be read comes out as a `Skip`, with the reason and the place.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_TEXT_NAMES = """
    txt text md markdown rst tex py pyi pyx c h cc cpp cxx hpp hh cu cuh java kt kts scala go rs js mjs jsx ts tsx rb
    php pl pm lua swift m mm cs fs hs ml mli clj erl ex exs jl r f f90 f95 asm s sh bash zsh fish ps1 sql html htm
    css scss vue svelte proto cmake zig nim d dart v sv vhd lean coq el lisp scm vim tcl
"""
TEXT_SUFFIXES = frozenset(f".{name}" for name in _TEXT_NAMES.split())
_CHUNK = 1 << 20
_BROKEN_STREAM = (OSError, EOFError, zlib.error)


class Document(NamedTuple):
    """One document: its text and the same text as UTF-8 bytes."""

    text: str
    data: bytes


class Skip(NamedTuple):
    """A document left out: why ("not UTF-8", "empty", ...) and where (file, with the line where there is one)."""

    reason: str
    where: str


@dataclass(frozen=True)
class Piece:
    """A part of one file that is read in one go.

    `kind` is "text", "jsonl", "jsonl.gz", "jsonl.zst" or "parquet". `start` and `stop` are bytes for "jsonl" (a line
    belongs to the piece that holds its first byte), row groups for "parquet", and unused otherwise. `weight` is the
    rough size of its text in bytes.
    """

    path: str
    kind: str
    start: int = 0
    stop: int = 0
    weight: int = 0


def kind_of(path: Path) -> str | None:
    """Kind of file (see `Piece`) that a name's suffix stands for, or None when it is not one we know."""
    name = path.name.lower()
    for kind in ("jsonl.gz", "jsonl.zst", "jsonl", "parquet"):
        if name.endswith(f".{kind}"):
            return kind
    return "text" if path.suffix.lower() in TEXT_SUFFIXES else None


def read_piece(piece: Piece, text_field: str) -> Iterator[Document | Skip]:
    """Documents and skips of one piece, in file order. `text_field` is the JSON key or Parquet column of the text."""
    try:
        if piece.kind == "text":
            yield _document(Path(piece.path).read_bytes(), piece.path)
        elif piece.kind == "jsonl":
            yield from _plain_jsonl(piece, text_field)
        elif piece.kind == "parquet":
            yield from _parquet(piece, text_field)
        else:
            yield from _packed_jsonl(piece, text_field)
    except OSError as error:
        yield Skip("unreadable", f"{piece.path} ({error.strerror or error})")


def _document(data: bytes, where: str) -> Document | Skip:
    """A document from UTF-8 bytes (a byte-order mark is dropped)."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Skip("not UTF-8", where)
    return Document(text, data) if text and not text.isspace() else Skip("empty", where)


def _from_text(text: object, text_field: str, where: str) -> Document | Skip:
    """A document from a JSON or Parquet value."""
    if not isinstance(text, str):
        return Skip(f'no text in field "{text_field}"', where)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return Skip("not UTF-8", where)
    return Document(text, data) if text and not text.isspace() else Skip("empty", where)


def _json_line(line: bytes, text_field: str, where: str) -> Document | Skip:
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError:
        return Skip("not UTF-8", where)
    except (ValueError, RecursionError):
        return Skip("bad JSON line", where)
    return _from_text(record.get(text_field) if isinstance(record, dict) else None, text_field, where)


def _plain_jsonl(piece: Piece, text_field: str) -> Iterator[Document | Skip]:
    with open(piece.path, "rb") as stream:
        position = piece.start
        if position:  # step back one byte: if it is a newline the piece starts with a whole line
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        number = 0
        if piece.stop == 0:
            yield Skip("empty", piece.path)
        while position < piece.stop:
            line = stream.readline()
            if not line:
                break
            number += 1
            if not line.isspace():
                where = f"{piece.path} at byte {position}" if piece.start else f"{piece.path} line {number}"
                yield _json_line(line, text_field, where)
            position += len(line)


def _packed_jsonl(piece: Piece, text_field: str) -> Iterator[Document | Skip]:
    """Lines of a compressed file. A break in the stream ends it: what was read before it is kept."""
    number = 0
    try:
        for line in _lines(_gzip_chunks(piece.path) if piece.kind == "jsonl.gz" else _zstd_chunks(piece.path)):
            number += 1
            if line and not line.isspace():
                yield _json_line(line, text_field, f"{piece.path} line {number}")
    except _BROKEN_STREAM as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file itself cannot be read
        yield Skip(f"broken {piece.kind.rpartition('.')[2]}", f"{piece.path} after line {number}")
        return
    if number == 0:
        yield Skip("empty", piece.path)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    tail = b""
    for chunk in chunks:
        *whole, tail = (tail + chunk).split(b"\n")
        yield from whole
    if tail:
        yield tail


def _gzip_chunks(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
    """Every frame of a file, as multi-threaded writers make several.

    `ZstdDecompressor.stream_reader` takes a truncated file for a finished one, so the frames are followed by hand.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, inside = decompressor.decompressobj(), False
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                while chunk:
                    yield frame.decompress(chunk)
                    inside, chunk = True, b""
                    if frame.eof:
                        chunk, inside = frame.unused_data, False
                        frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if inside:
        raise EOFError("the last frame is not finished")


def _parquet(piece: Piece, text_field: str) -> Iterator[Document | Skip]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(piece.path) as table:
            if text_field not in table.schema_arrow.names:
                yield Skip(f'no text in field "{text_field}"', piece.path)
                return
            if table.metadata.num_rows == 0:
                yield Skip("empty", piece.path)
            groups = range(piece.start, piece.stop)
            for batch in table.iter_batches(256, row_groups=groups, columns=[text_field], use_threads=False):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"{piece.path} row {row} of groups {piece.start}-{piece.stop - 1}"
                    yield _from_text(value, text_field, where)
    except UnicodeDecodeError:
        yield Skip("not UTF-8", f"{piece.path} after row {row} of groups {piece.start}-{piece.stop - 1}")
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Skip("broken parquet", f"{piece.path} after row {row}")
