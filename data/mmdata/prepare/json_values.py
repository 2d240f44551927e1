"""Records of a JSON file of any layout: an array of them, one after the other, printed over many lines or on one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mmdata.prepare.streams import RECORD_LIMIT

_BETWEEN = re.compile(rb"[\s,\x1e]*")
_SCALAR = re.compile(rb'[^\s,\x1e{}\[\]"]*')
_STRUCTURE = re.compile(rb'["{}\[\]]')
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.S)  # up to the closing quote
_OPENS, _CLOSES, _QUOTE, _BACKSLASH = b"{[", b"}]", ord('"'), ord("\\")


def json_values(pieces: Iterable[bytes]) -> Iterator[bytes | None]:
    """Values of a JSON text one by one, as their bytes, unchecked but for brackets and quotes.

    An array at the top is opened: its elements are the values. No more than one value is held at a time. One that is
    larger than `RECORD_LIMIT` comes as None and ends the text.

    Args:
        pieces: the text, cut anywhere.
    """
    buffer = bytearray()
    scan = _Scan()
    for piece in pieces:
        buffer += piece
        while (end := scan.step(buffer)) is not None:
            yield bytes(buffer[scan.start : end])
            scan.start = -1
        done = scan.start if scan.start >= 0 else scan.at
        del buffer[:done]
        scan.at -= done
        scan.start = min(scan.start, 0)
        if len(buffer) > RECORD_LIMIT:
            yield None
            return
    if scan.start >= 0:
        yield bytes(buffer)  # the text ends inside it, or it is a number


def text_in(record: Any, text_field: str) -> Any:
    """Value of a field: of that very name, or down a path of names joined by dots; None if there is none."""
    if not isinstance(record, dict) or text_field in record or "." not in text_field:
        return record.get(text_field) if isinstance(record, dict) else None
    first, _, rest = text_field.partition(".")
    return text_in(record.get(first), rest)


def text_fields(record: Any, prefix: str = "") -> list[tuple[str, int]]:
    """Fields of a record that hold text, with the number of characters; names in objects are joined by dots."""
    if not isinstance(record, dict):
        return []
    found = [(f"{prefix}{name}", len(value)) for name, value in record.items() if isinstance(value, str)]
    if prefix.count(".") < 3:
        for name, value in record.items():
            found += text_fields(value, f"{prefix}{name}.")
    return found


def starts_as_lines(head: bytes) -> bool:
    """Whether a JSON file is one of JSON lines, from its first bytes: its first line is a value that ends there."""
    first, newline, rest = head.lstrip().partition(b"\n")
    if first.startswith(b"["):
        return False
    if _parses(first):
        return True
    if _starts_with_value(first):
        return False
    if not newline:
        return first.startswith(b"{")
    # A damaged first line: lines all the same if a later one is an object from its first column.
    return any(line.startswith(b"{") and len(line) > 2 and _parses(line) for line in rest.split(b"\n")[:-1][:100])


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _starts_with_value(head: bytes) -> bool:
    """Whether a whole value stands at the start, so that what follows it on its line is another."""
    try:
        json.JSONDecoder().raw_decode(head.lstrip().decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return True


class _Scan:
    """Place in a JSON text: `at`, the start of the value at hand (-1 between values), and its open brackets."""

    def __init__(self) -> None:
        self.at = 0
        self.start = -1
        self._depth = 0
        self._in_string = False
        self._in_array = False

    def step(self, buffer: bytearray) -> int | None:
        """Go to the end of the value at hand or of the next one; None if it lies beyond `buffer`."""
        while self.at < len(buffer):
            if self.start < 0 and not self._find_start(buffer):
                continue
            if self._in_string:
                self.at = _STRING.match(buffer, self.at).end()  # type: ignore[union-attr] (it matches nothing too)
                if self.at >= len(buffer) or buffer[self.at] == _BACKSLASH:
                    return None  # the escaped byte is still to come
                self._in_string = False
                self.at += 1
                if self._depth == 0:
                    return self.at
            elif self._depth == 0 and buffer[self.start] not in b'{["':
                self.at = max(_SCALAR.match(buffer, self.at).end(), self.start + 1)  # type: ignore[union-attr]
                return self.at if self.at < len(buffer) else None
            elif self._bracket_ends(buffer):
                return self.at
        return None

    def _find_start(self, buffer: bytearray) -> bool:
        """Pass separators and the brackets of a top array; whether a value begins here."""
        self.at = _BETWEEN.match(buffer, self.at).end()  # type: ignore[union-attr]
        if self.at >= len(buffer):
            return False
        if buffer[self.at] == ord("]" if self._in_array else "["):
            self._in_array = not self._in_array
            self.at += 1
            return False
        self.start, self._depth, self._in_string = self.at, 0, False
        return True

    def _bracket_ends(self, buffer: bytearray) -> bool:
        """Go past the next bracket or quote; whether it closes the value."""
        found = _STRUCTURE.search(buffer, self.at)
        if found is None:
            self.at = len(buffer)
            return False
        self.at = found.end()
        byte = buffer[found.start()]
        self._in_string = byte == _QUOTE
        self._depth += (byte in _OPENS) - (byte in _CLOSES)
        return self._depth == 0 and byte in _CLOSES
