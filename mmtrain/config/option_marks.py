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

LAYOUT: Mapping[str, bool] = {"layout": True}
"""The option may differ between launches of one run: it moves the same numbers to other processes, or computes them in
another order, so that what a run comes to is the same but for rounding."""

SHAPES_WEIGHTS: Mapping[str, bool] = {"shapes_weights": True}
"""The option decides which weights a model has, or their shapes: a checkpoint fits only a model with the same value."""


def is_marked(kind: type, option: str, mark: Mapping[str, bool]) -> bool:
    """Tell whether an option carries a mark, itself or through a group that it belongs to.

    Args:
        kind: the dataclass that the dotted name starts from.
        option: dotted name of an option, with a place in each list (``stage.phases[0].lr``); a name that `kind` does
            not know carries no mark of its own.
        mark: FREE_ON_RESUME, LAYOUT or SHAPES_WEIGHTS.
    """
    first, _, rest = option.partition(".")
    name = first.partition("[")[0]
    field = next((field for field in dataclasses.fields(kind) if field.name == name), None)
    if field is None:
        return False
    if mark.items() <= field.metadata.items():
        return True
    inner = _group(typing.get_type_hints(kind)[name])
    return bool(rest) and inner is not None and is_marked(inner, rest, mark)


def marked_fields(kind: type, mark: Mapping[str, bool]) -> list[dataclasses.Field[Any]]:
    """Return the fields of the dataclass `kind` that carry a mark, in the order of their declaration."""
    return [field for field in dataclasses.fields(kind) if mark.items() <= field.metadata.items()]


def _group(hint: Any) -> type | None:
    """Return the dataclass that a type is, or that its lists and optionals are of; None where there is none."""
    if dataclasses.is_dataclass(hint):
        return typing.cast("type", hint)
    return next((group for group in map(_group, typing.get_args(hint)) if group is not None), None)
