"""Allowed values of options, kept as metadata of the field that declares each: a choice of names, or a range.

One declaration serves the check, the message that refuses a value, and the page that lists all options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmtrain.config.checks import choose, require


@dataclass(frozen=True)
class Range:
    """An interval of numbers; infinity and NaN are in none.

    Attributes:
        low: lower end.
        high: upper end; None where there is none.
        low_open: `low` itself is not allowed.
        high_open: `high` itself is not allowed.
        fix: what to do instead of a value outside.
    """

    low: float
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    fix: str = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        if self.high is None:
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high:g}"


def one_of(*names: str) -> Mapping[str, Any]:
    """Allow these names only; metadata of a field of text."""
    return {"one_of": names}


def key_of(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Allow the keys of a table only, those too that are entered later; metadata of a field of text."""
    return {"one_of": table}


def at_least(low: float, high: float | None = None, fix: str = "") -> Mapping[str, Any]:
    """Allow numbers from `low` on, to `high` if given; metadata of a field of a number, or of a number or text."""
    return {"range": Range(low, high, fix=fix)}


def above(low: float, high: float | None = None, fix: str = "") -> Mapping[str, Any]:
    """Allow numbers above `low`, to `high` if given; metadata of a field of a number."""
    return {"range": Range(low, high, low_open=True, fix=fix)}


def share() -> Mapping[str, Any]:
    """Allow numbers from 0 on and below 1; metadata of a field of a number."""
    return {"range": Range(0, 1, high_open=True)}


def check_allowed(options: Any, path: str) -> None:
    """Check every option of a group, and of the groups and lists of groups inside it.

    Args:
        options: a dataclass; values are of the declared types already.
        path: dotted name of the group.

    Raises:
        ConfigError: the first option whose value is not allowed.
    """
    for field in dataclasses.fields(options):
        value, option = getattr(options, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            check_allowed(value, option)
        for i, item in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(item):
                check_allowed(item, f"{option}[{i}]")
            else:
                _check_value(field, item, f"{option}[{i}]")
        if not isinstance(value, list):
            _check_value(field, value, option)


def _check_value(field: dataclasses.Field[Any], value: Any, option: str) -> None:
    """Refuse a value, or an entry of a list, that the field's metadata does not allow."""
    limits, names = field.metadata.get("range"), field.metadata.get("one_of")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if limits is not None and number:
        default = field.default if isinstance(field.default, int | float) else None
        words = f"{limits}" if math.isfinite(value) else f"a finite number, {limits}"
        require(value in limits, option, value, f"must be {words}", limits.fix or _example(limits, default))
    elif names is not None and value is not None and limits is not None:
        require(value in names, option, value, f"must be {limits}, or {' or '.join(names)}", "for example 1")
    elif names is not None and value is not None and not isinstance(value, bool):
        choose(option, value, names)


def _example(limits: Range, default: float | None) -> str:
    if default is not None and default in limits:
        return f"the default is {default}"
    return f"give a number {limits}"
