"""Reading documents out of files: text and source code, JSON of any layout, and Parquet; packed or not.

Nothing here is fatal: a file or record that cannot be read comes out as a `Skip`, with the reason and the place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeVar

from mmdata.prepare import parquet
from mmdata.prepare.json_values import json_values, text_fields, text_in
from mmdata.prepare.skips import Skip
from mmdata.prepare.streams import CHUNK, RECORD_LIMIT, BrokenStreamError, chunks, lines
from mmdata.prepare.text_files import Separator, fragments, section

_Item = TypeVar("_Item")
_TOO_LONG = f"record over {RECORD_LIMIT >> 20} MiB"


class Document(NamedTuple):
    """One document, or a fragment of a long one: its text and the same text as UTF-8 bytes.

    `more` says that the document goes on in the next item. If that is a `Skip`, all of the document is left out.
    """

    text: str
    data: bytes
    more: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of one file that is read in one go.

    `kind` is "text", "jsonl" (a record a line), "json" (records in any layout) or "parquet"; `packed` is "gz", "zst",
    "bz2", "xz" or "". `start` and `stop` are bytes for unpacked "jsonl" (a line belongs to the piece that holds its
    first byte) and for "text" that is cut at separators, row groups for "parquet", and 0 where the whole file is meant.
    `weight` is the rough size of its text in bytes.
    """

    path: str
    kind: str
    start: int = 0
    stop: int = 0
    weight: int = 0
    packed: str = ""


def read_piece(piece: Piece, text_field: str, separator: Separator | None = None) -> Iterator[Document | Skip]:
    """Documents and skips of one piece, in file order.

    Args:
        piece: what to read.
        text_field: JSON key or Parquet column of the text; names joined by dots lead into objects.
        separator: what stands between the documents of a text file; None makes a file one document.
    """

    def document(data: bytes | None, where: str, bad: str) -> Document | Skip:
        return _json_record(data, text_field, where, bad)

    if piece.kind == "text":
        yield from guarded(piece, _text(piece, separator))
    elif piece.kind == "parquet":
        yield from guarded(piece, _parquet(piece, text_field))
    else:
        yield from json_records(piece, document)


def json_records(piece: Piece, make: Callable[[bytes | None, str, str], _Item]) -> Iterator[_Item | Skip]:
    """What `make` makes of each record of a "json" or "jsonl" piece, in file order, and skips.

    Args:
        piece: what to read.
        make: gets a record's bytes (None: it is too long), its place, and the reason to give if they are not JSON.
    """
    read = {"json": _json, "jsonl": _packed_jsonl if piece.packed else _plain_jsonl}
    yield from guarded(piece, read[piece.kind](piece, make))


def json_value(data: bytes | None, where: str, bad: str) -> Any | Skip:
    """Value that the bytes of a record spell, or why there is none (see :func:`json_records`)."""
    if data is None:
        return Skip(_TOO_LONG, where)
    try:
        return json.loads(data.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError:
        return Skip("not UTF-8", where)
    except (ValueError, RecursionError):
        return Skip(bad, where)


def guarded(piece: Piece, items: Iterator[_Item]) -> Iterator[_Item | Skip]:
    """Items read from a piece; an error of its file becomes the last of them, a skip."""
    try:
        yield from items
    except UnicodeDecodeError:
        yield Skip("not UTF-8", f"{piece.path} (its mark says UTF-16 or UTF-32)")
    except BrokenStreamError:
        yield Skip(f"broken {piece.packed}", piece.path)
    except OSError as error:
        place = f" from byte {piece.start}" if piece.start else ""
        yield Skip("unreadable", f"{piece.path}{place} ({error.strerror or error})")


def _text(piece: Piece, separator: Separator | None) -> Iterator[Document | Skip]:
    if separator is not None and piece.stop:
        pieces = section(piece.path, piece.start, piece.stop, separator)
    else:
        pieces = chunks(piece.path, piece.packed)
    number = told = 0
    begun, blank, bad = False, True, False  # of the document at hand: fragments went out, white space only, not UTF-8
    for data, more in fragments(pieces, separator):
        where = piece.path if separator is None else _place(piece, f"document {number + 1}")
        try:
            text = "" if bad else data.decode("utf-8")
        except UnicodeDecodeError:
            yield Skip("not UTF-8", where)
            bad, told = True, told + 1
        if not bad:
            blank = blank and (not text or text.isspace())
            if more or not blank:
                yield Document(text, data, more)
                begun, told = True, told + 1
            elif begun:
                yield Skip("empty", where)
        if not more:
            number, begun, blank, bad = number + 1, False, True, False
    if not told and piece.start == 0:
        yield Skip("empty", piece.path)


def _place(piece: Piece, place: str) -> str:
    """Where a record is: its number is counted from the start of its piece."""
    return f"{piece.path} {place}" + (f" from byte {piece.start}" if piece.start else "")


def _from_value(text: object, text_field: str, where: str, fields: tuple[tuple[str, int], ...] = ()) -> Document | Skip:
    """A document from a JSON or Parquet value."""
    if not isinstance(text, str | bytes):
        return Skip(f'no text in field "{text_field}"', where, fields)
    try:
        text, data = (text, text.encode("utf-8")) if isinstance(text, str) else (text.decode("utf-8"), text)
    except UnicodeError:  # of bytes, or a lone surrogate, which JSON can spell
        return Skip("not UTF-8", where)
    return Document(text, data) if text and not text.isspace() else Skip("empty", where)


def _json_record(data: bytes | None, text_field: str, where: str, bad: str) -> Document | Skip:
    """A document from the bytes of a JSON object. `bad` is the reason given where they are not JSON."""
    record = json_value(data, where, bad)
    if isinstance(record, Skip):
        return record
    text = text_in(record, text_field)
    fields = () if isinstance(text, str) else tuple(text_fields(record))
    return _from_value(text, text_field, where, fields)


def _plain_jsonl(piece: Piece, make: Callable[[bytes | None, str, str], _Item]) -> Iterator[_Item | Skip]:
    with open(piece.path, "rb") as stream:
        position = piece.start
        if position:  # step back one byte: if it is a newline the piece starts with a whole line
            stream.seek(position - 1)
            position += _rest_of_line(stream) - 1
        number = 0
        if piece.stop == 0:
            yield Skip("empty", piece.path)
        while position < piece.stop:
            line: bytes | None = stream.readline(RECORD_LIMIT)
            if not line:
                break
            number += 1
            where = f"{piece.path} at byte {position}" if piece.start else f"{piece.path} line {number}"
            position += len(line)
            if len(line) == RECORD_LIMIT and not line.endswith(b"\n"):
                position, line = position + _rest_of_line(stream), None
            if line is None or not line.isspace():
                yield make(line, where, "bad JSON line")


def _rest_of_line(stream: BinaryIO) -> int:
    """Pass the rest of a line, in bounded memory; its size in bytes."""
    size = 0
    while part := stream.readline(CHUNK):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _packed_jsonl(piece: Piece, make: Callable[[bytes | None, str, str], _Item]) -> Iterator[_Item | Skip]:
    """Lines of a compressed file. A break in the stream ends it: what was read before it is kept."""
    number = 0
    try:
        for line in lines(chunks(piece.path, piece.packed)):
            number += 1
            if line is None or (line and not line.isspace()):
                yield make(line, f"{piece.path} line {number}", "bad JSON line")
    except BrokenStreamError:
        yield Skip(f"broken {piece.packed}", f"{piece.path} after line {number}")
        return
    if number == 0:
        yield Skip("empty", piece.path)


def _json(piece: Piece, make: Callable[[bytes | None, str, str], _Item]) -> Iterator[_Item | Skip]:
    """Records of a JSON file. A break in the stream ends it: what was read before it is kept."""
    number = 0
    try:
        for value in json_values(chunks(piece.path, piece.packed)):
            number += 1
            yield make(value, f"{piece.path} value {number}", "bad JSON value")
    except BrokenStreamError:
        yield Skip(f"broken {piece.packed}", f"{piece.path} after value {number}")
        return
    if number == 0:
        yield Skip("empty", piece.path)


def _parquet(piece: Piece, text_field: str) -> Iterator[Document | Skip]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    groups = f"of groups {piece.start}-{piece.stop - 1}"
    try:
        with pq.ParquetFile(piece.path) as table:
            names = parquet.column_of(table.schema_arrow, text_field)
            if names is None:
                if piece.start == 0:  # once a file
                    fields = tuple(parquet.text_columns(table))
                    yield Skip(f'no text in field "{text_field}"', piece.path, fields)
                return
            if table.metadata.num_rows == 0:
                yield Skip("empty", piece.path)
            for value in parquet.values(table, names, range(piece.start, piece.stop)):
                row += 1
                yield _from_value(value, text_field, f"{piece.path} row {row} {groups}")
    except UnicodeDecodeError:
        yield Skip("not UTF-8", f"{piece.path} after row {row} {groups}")
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Skip("broken parquet", f"{piece.path} after row {row}")
