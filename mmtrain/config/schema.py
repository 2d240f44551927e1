"""Conversion of a plain nested dict, as Hydra composes it, to typed dataclasses; unknown options are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from mmtrain.errors import ConfigError, nearest

T = TypeVar("T")

_SUFFIX = {
    "": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip


def parse_count(value: int | float | str, option: str) -> int:
    """Read a count of tokens or steps: ``8192``, ``2e6``, ``"16M"``, ``"7.2T"`` or, in powers of two, ``"128Ki"``.

    Raises:
        ConfigError: not a non-negative whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(option, value, "not a count", "write a number such as 8192, 16M, 7.2T or 128Ki")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE]\+?\d+)?)\s*(K|M|B|T|Ki|Mi|Gi|Ti|)\s*", value)
        if match is None:
            raise ConfigError(option, value, "not a count", "write a number such as 8192, 16M, 7.2T or 128Ki")
        number = float(match[1]) * _SUFFIX[match[2]]
    else:
        number = float(value)
    if not 0 <= number < float("inf") or abs(number - round(number)) > 1e-6 * max(1.0, number):
        raise ConfigError(option, value, "not a whole number of at least 0", "write a number such as 8192 or 16M")
    return round(number)


class Count(int):
    """A whole number that YAML may write with a suffix (see :func:`parse_count`)."""


_EXAMPLES = {
    bool: "true or false",
    int: "a whole number such as 8",
    float: "a number such as 0.1, 1e-4 or 1/64",
    str: "text, in quotes where it has special characters",
}


def build(cls: type[T], values: Any, path: str = "") -> T:
    """Build dataclass `cls` from nested `values`, checking names and types.

    Args:
        cls: a dataclass whose field types are built-ins, :class:`Count`, dataclasses, and lists, optionals or unions of
            these (a union takes the first type that fits).
        values: a mapping of its fields; missing fields take the class's defaults.
        path: dotted option name of `values`, for messages.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a missing required field, or a wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(path or "config", values, "expected a group of options",
                          f"write it as {{name: value, ...}} of {', '.join(f.name for f in dataclasses.fields(cls))}")  # type: ignore[arg-type]  # fmt: skip
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(_join(path, name), values[name], "unknown option", nearest(str(name), fields))
    made = {}
    for name, field in fields.items():
        if name in values:
            made[name] = _convert(hints[name], values[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(_join(path, name), "(missing)", "required", "give it a value")
    return cls(**made)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _convert(hint: Any, value: Any, option: str) -> Any:
    """Convert one value to the annotated type, or raise ConfigError naming the option."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value == "???":
        raise ConfigError(option, "???", "required", f"give it on the command line: {option}=...")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert_union([arg for arg in args if arg is not type(None)], value, option)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(option, value, "expected a list", _list_example(args[0], value))
        return [_convert(args[0], item, f"{option}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(hint):
        return build(hint, value, option)  # type: ignore[type-var]
    if hint is Count:
        return Count(parse_count(value, option))
    return _convert_plain(hint, value, option)


def _convert_union(hints: list[Any], value: Any, option: str) -> Any:
    """Convert to the first of `hints` that takes the value; the error of a single hint is its own, as it says more."""
    if len(hints) == 1:
        return _convert(hints[0], value, option)
    for hint in hints:
        with contextlib.suppress(ConfigError):
            return _convert(hint, value, option)
    names = " or ".join(hint.__name__ for hint in hints)
    raise ConfigError(option, value, f"expected {names}, got {type(value).__name__}", f"give {_EXAMPLES[hints[0]]}")


def _list_example(item: Any, value: Any) -> str:
    """Return how a list of such items is written; of the value that was given, where it may be one of them."""
    if dataclasses.is_dataclass(item):
        names = [field.name for field in dataclasses.fields(item) if field.default is dataclasses.MISSING]
        return f"write it as [{{{', '.join(f'{name}: ...' for name in names)}}}]"
    return f"write it as [{value}]"


def _convert_plain(hint: type, value: Any, option: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(option, f"{str(value)[:20]}...", "is beyond a float", "give a smaller number") from None
    if hint is float and isinstance(value, str) and re.fullmatch(r"[0-9.eE+-]+(/[0-9.eE+-]+)?", value):
        numerator, _, denominator = value.partition("/")  # YAML reads 1e-4 and 1/64 as text
        try:
            return float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            pass
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, int | float):
        raise ConfigError(option, value, f"expected text, and YAML made a {type(value).__name__} of what was written",
                          "put it in quotes in the file")  # fmt: skip
    raise ConfigError(option, value, f"expected {hint.__name__}, got {type(value).__name__}", f"give {_EXAMPLES[hint]}")
