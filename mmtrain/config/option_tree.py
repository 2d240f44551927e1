"""Tree of all options: their dotted names and types, as the dataclasses declare them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any


def option_type(kind: Any, option: str) -> Any:
    """Return the declared type of the option of this dotted name below the type `kind`; None where there is none.

    Positions in lists are numbers: ``stage.phases.0.name``.
    """
    for part in option.split("."):
        inner = without_none(kind)
        if typing.get_origin(inner) is list and part.isdigit():
            kind = typing.get_args(inner)[0]
        elif dataclasses.is_dataclass(inner) and part in (hints := typing.get_type_hints(inner)):
            kind = hints[part]
        else:
            return None
    return kind


def options_of(kind: Any) -> dict[str, Any]:
    """Return the options of a dataclass and their types, without their None; nothing for other types."""
    if not dataclasses.is_dataclass(kind):
        return {}
    return {name: without_none(hint) for name, hint in typing.get_type_hints(kind).items()}


def without_none(hint: Any) -> Any:
    """Return `hint` without its None; of a union of several types the first."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def option_paths(kind: Any, above: str = "") -> Iterator[str]:
    """Yield the dotted name of every option that is not a group."""
    for name, hint in options_of(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from option_paths(hint, f"{above}{name}.")
        else:
            yield above + name
