"""Documents of plain text files: one a file, or many with a separator between them, read in bounded memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from mmdata.errors import DataError
from mmdata.prepare.streams import CHUNK

FRAGMENT = 1 << 21  # bytes of text handed on at a time
_ESCAPE = re.compile(r"\\(n|r|t|\\|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


class Fragment(NamedTuple):
    """Part of a document: its bytes, cut between characters, and whether the document goes on behind it."""

    data: bytes
    more: bool


@dataclass(frozen=True)
class Separator:
    """Pattern that stands between documents, and the most bytes that one match takes."""

    pattern: re.Pattern[bytes]
    longest: int


def unescaped(text: str) -> str:
    r"""Text of a command line with its escapes \n \r \t \\ \xNN \uNNNN read."""
    return _ESCAPE.sub(lambda found: _LETTERS.get(found[1]) or chr(int(found[1][1:], 16)), text)


def parse_separator(text: str) -> Separator:
    r"""Read `--separator`: plain text with the escapes \n \r \t \\ \xNN \uNNNN. \n also matches a Windows line end.

    Raises:
        DataError: it is empty.
    """
    plain = unescaped(text)
    if not plain:
        raise DataError(
            "--separator is empty: give the text between documents, for example '<|endoftext|>' or '\\n\\n'"
        )
    parts = [re.escape(part.encode()) for part in plain.split("\n")]
    return Separator(re.compile(rb"\r?\n".join(parts)), len(plain.encode()) + plain.count("\n"))


def fragments(pieces: Iterable[bytes], separator: Separator | None) -> Iterator[Fragment]:
    """Documents of a text, as fragments of about `FRAGMENT` bytes; line ends beside a separator are dropped.

    Args:
        pieces: the text, cut anywhere.
        separator: None makes it one document.
    """
    held = b""
    begun = False  # whether a byte of the document at hand has gone out
    for piece in pieces:
        held += piece
        start = 0
        if separator is not None:
            for found in separator.pattern.finditer(held):
                yield Fragment(_trimmed(held[start : found.start()], not begun, True), False)
                start, begun = found.end(), False
        if len(held) - start > FRAGMENT:
            stop = _safe_end(held, start, separator)
            data = _trimmed(held[start:stop], separator is not None and not begun, False)
            yield Fragment(data, True)
            start, begun = stop, begun or bool(data)
        held = held[start:]
    yield Fragment(_trimmed(held, not begun, True) if separator else held, False)


def section(path: str, start: int, stop: int, separator: Separator) -> Iterator[bytes]:
    """Bytes `start` to `stop` of a text file, both moved on to the end of the first separator that begins there.

    So neighbouring sections meet between documents. Byte 0 and the end of the file stay.
    """
    with open(path, "rb") as stream:
        begin, end = _behind_separator(stream, start, separator), _behind_separator(stream, stop, separator)
        stream.seek(begin)
        while begin < end and (data := stream.read(min(CHUNK, end - begin))):
            yield data if begin else data.removeprefix(codecs.BOM_UTF8)
            begin += len(data)


def _behind_separator(stream: BinaryIO, position: int, separator: Separator) -> int:
    if position == 0:
        return 0
    stream.seek(position)
    held = b""
    while data := stream.read(CHUNK):
        held += data
        if found := separator.pattern.search(held):
            return position + found.end()
        kept = min(len(held), separator.longest - 1)
        position += len(held) - kept
        held = held[len(held) - kept :]
    return position + len(held)


def _safe_end(held: bytes, start: int, separator: Separator | None) -> int:
    """End of a fragment that leaves whole what may be a separator's beginning, line ends before one, a character."""
    stop = max(len(held) - (separator.longest if separator else 1), start)
    if separator is not None:
        kept = len(held[start:stop].rstrip(b"\r\n"))
        stop = start + kept if kept or stop - start < 16 * FRAGMENT else stop
    for _ in range(3):
        if held[stop] & 0xC0 == 0x80:  # inside a character
            stop -= 1
    return stop


def _trimmed(data: bytes, first: bool, last: bool) -> bytes:
    """`data` without the line ends at the document's edges that it holds."""
    data = data.lstrip(b"\r\n") if first else data
    return data.rstrip(b"\r\n") if last else data
