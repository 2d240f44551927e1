"""JSON and JSON-lines files of a user, with errors that name file, record and field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.json_text import parse_json


def read_text(path: Path, option: str) -> str:
    """Return the text of a file.

    Raises:
        ConfigError: it is missing, cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(option, path, f"cannot be read ({error.strerror})", "give a file that is there") from None
    except UnicodeDecodeError as error:
        raise ConfigError(option, path, f"is not UTF-8 text (byte {error.start:,})", "save it as UTF-8") from None


def read_json(path: Path, option: str) -> Any:
    """Return what a JSON file holds.

    Raises:
        ConfigError: it cannot be read, or is no JSON; the line is named.
    """
    try:
        return parse_json(read_text(path, option))
    except json.JSONDecodeError as error:
        raise ConfigError(option, path, f"is no JSON: {error.msg} in line {error.lineno}",
                          "download or save it again") from None  # fmt: skip


def read_jsonl(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file with one JSON object a line, each with its place ("line 3"); empty lines are passed.

    Raises:
        ConfigError: it cannot be read, or a line is no JSON object; the line is named.
    """
    for number, line in enumerate(read_text(path, option).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except json.JSONDecodeError as error:
            raise damaged(option, path, f"line {number}", f"is no JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise damaged(option, path, f"line {number}", "is no JSON object")
        yield f"line {number}", record


def text_of(record: Mapping[str, Any], name: str, option: str, path: Path, place: str) -> str:
    """Return a field of a record that must be a text with something in it.

    Raises:
        ConfigError: it is missing, empty, or no text.
    """
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise damaged(option, path, place, f'has no text "{name}"')
    return value


def damaged(option: str, path: Path, place: str, problem: str) -> ConfigError:
    """Return the error of a record that cannot be used."""
    return ConfigError(option, path, f"{place} {problem}", "mend it, or take it out")
