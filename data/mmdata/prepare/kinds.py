"""What a file holds, by its name and, where the name leaves it open, by its first bytes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmdata.prepare.json_values import starts_as_lines
from mmdata.prepare.streams import PACKINGS, head_of, is_wide, packing_of

_TEXT_NAMES = """
    txt text md markdown rst tex py pyi pyx c h cc cpp cxx hpp hh cu cuh java kt kts scala go rs js mjs jsx ts tsx rb
    php pl pm lua swift m mm cs fs hs ml mli clj erl ex exs jl r f f90 f95 asm s sh bash zsh fish ps1 sql html htm
    css scss vue svelte proto cmake zig nim d dart v sv vhd lean coq el lisp scm vim tcl
"""
TEXT_SUFFIXES = frozenset(f".{name}" for name in _TEXT_NAMES.split())
_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_ARCHIVES = {".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"}
_TABLES = {".csv", ".tsv"}
_HEAD = 1 << 16  # bytes looked at
_FIRST_BYTES = {b"PAR1": "parquet", b"PK\x03\x04": "archive", b"7z\xbc\xaf\x27\x1c": "archive", b"Rar!": "archive"}


class Kind(NamedTuple):
    """Kind of file and its packing, as in `Piece`; or a reason why it is not read ("archive", "table")."""

    name: str
    packed: str = ""

    @property
    def is_read(self) -> bool:
        """Whether there is a reader for it."""
        return self.name not in ("archive", "table")


def kind_by_name(path: Path) -> Kind | None:
    """Kind that a name's suffixes stand for, None when they are not ones we know. JSON is "json", of any layout."""
    suffix, packed = _suffix_and_packing(path)
    if suffix in _ARCHIVES:
        return Kind("archive")
    if suffix in _TABLES:
        return Kind("table")
    if suffix in _JSON_SUFFIXES:
        return Kind("json", packed)
    if suffix == ".parquet" and not packed:
        return Kind("parquet")
    return Kind("text", packed) if suffix in TEXT_SUFFIXES else None


def kind_in_folder(path: Path, suffixes: tuple[str, ...]) -> Kind | None:
    """Kind of a file found in a folder; None if it is not to be taken.

    Args:
        path: the file.
        suffixes: the only ones to take, in small letters; empty takes those we know. A table is then plain text.
    """
    kind = kind_by_name(path)
    if suffixes:
        if not path.name.lower().endswith(suffixes):
            return None
        kind = _as_text(path) if kind is None or kind.name == "table" else kind
    return settled(path, kind) if kind else None


def kind_given(path: Path, suffixes: tuple[str, ...]) -> Kind:
    """Kind of a file named outright: by its first bytes if its suffix says nothing, and then text if they do not."""
    kind = kind_by_name(path)
    if kind is not None and kind.name == "table" and path.name.lower().endswith(suffixes or ("\0",)):
        return _as_text(path)
    return settled(path, kind or _by_content(path))


def settled(path: Path, kind: Kind) -> Kind:
    """Tell JSON lines from other JSON, and a packed file without the suffix for it, by the file's first bytes."""
    if kind.name != "json":
        return kind
    packed = kind.packed or packing_of(path)
    head = head_of(path, packed, _HEAD)
    one_a_line = starts_as_lines(head) and (packed or not _is_wide(path))  # UTF-16 cannot be cut at line ends
    empty = not packed and not head
    return Kind("jsonl" if one_a_line or empty else "json", packed)


def looks_like_json(path: Path, packed: str = "") -> bool:
    """Whether a text file begins with a JSON object, alone, on a line or in an array."""
    head = head_of(path, packed, _HEAD).lstrip()
    if head.startswith(b"["):
        return head[1:].lstrip().startswith((b'{"', b"{\n", b"{\r"))
    return head.startswith((b'{"', b"{\n", b"{\r", b"{ ")) and starts_as_lines(head)


def _suffix_and_packing(path: Path) -> tuple[str, str]:
    """Suffix in small letters without that of a packing, and the packing, each "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes.pop()[1:] if suffixes and suffixes[-1][1:] in PACKINGS else ""
    return suffixes[-1] if suffixes else "", packed


def _as_text(path: Path) -> Kind:
    return Kind("text", _suffix_and_packing(path)[1])


def _by_content(path: Path) -> Kind:
    packed = packing_of(path)
    head = head_of(path, packed, 512)
    for magic, name in _FIRST_BYTES.items():
        if head.startswith(magic) and not packed:
            return Kind(name)
    if head[257:262] == b"ustar":
        return Kind("archive")
    return Kind("json" if looks_like_json(path, packed) else "text", packed)


def _is_wide(path: Path) -> bool:
    try:
        return is_wide(str(path))
    except OSError:
        return False
