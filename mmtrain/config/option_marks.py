"""Marks on options: facts that a run asks of an option, kept as metadata of the field that declares it.

A mark on a group of options (a field whose type is a dataclass) holds for every option in the group.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

FREE_ON_RESUME: Mapping[str, bool] = {"free_on_resume": True}
"""The option may differ between launches of one run, because it changes none of the run's numbers."""

SHAPES_WEIGHTS: Mapping[str, bool] = {"shapes_weights": True}
"""The option decides which weights a model has, or their shapes: a checkpoint fits only a model with the same value."""


def is_marked(kind: type, option: str, mark: Mapping[str, bool]) -> bool:
    """Tell whether an option carries a mark, itself or through a group that it belongs to.

    Args:
        kind: the dataclass that the dotted name starts from.
        option: dotted name of an option; a name that `kind` does not know carries no mark of its own.
        mark: FREE_ON_RESUME or SHAPES_WEIGHTS.
    """
    name, _, rest = option.partition(".")
    field = next((field for field in dataclasses.fields(kind) if field.name == name), None)
    if field is None:
        return False
    if mark.items() <= field.metadata.items():
        return True
    inner = typing.get_type_hints(kind)[name]
    return bool(rest) and dataclasses.is_dataclass(inner) and is_marked(typing.cast("type", inner), rest, mark)


def marked_fields(kind: type, mark: Mapping[str, bool]) -> list[dataclasses.Field[Any]]:
    """Return the fields of the dataclass `kind` that carry a mark, in the order of their declaration."""
    return [field for field in dataclasses.fields(kind) if mark.items() <= field.metadata.items()]
