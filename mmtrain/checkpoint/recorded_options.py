"""Options of a run that was recorded, beside the options of a launch: what differs, by its place and one at a time."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

from mmtrain.config import PretrainConfig
from mmtrain.config.option_marks import FREE_ON_RESUME, is_marked


@dataclasses.dataclass(frozen=True)
class Difference:
    """An option of two values.

    Attributes:
        option: its place as it is typed, ``stage.phases[0].lr[1].end``.
        before: its recorded value; "(none)" where the record has no such place.
        now: its value in this launch; "(none)" likewise.
    """

    option: str
    before: Any
    now: Any


NOTHING = "(none)"
"""Value of a place that only one side has: an entry of a longer list, or an option of another version."""


def recorded_values(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with every option that its version did not have at this version's default."""
    return _filled(PretrainConfig, recorded)


def differences(before: dict[str, Any], now: PretrainConfig) -> list[Difference]:
    """Return every option of two values that may not differ between launches, in the order of their declaration.

    Args:
        before: a configuration as :func:`recorded_values` returns it.
        now: the configuration of this launch.
    """
    old, new = dict(_flat(before)), dict(_flat(json.loads(json.dumps(dataclasses.asdict(now)))))
    places = [option for option in dict.fromkeys([*new, *old]) if not is_marked(PretrainConfig, option, FREE_ON_RESUME)]
    found = [Difference(option, old.get(option, NOTHING), new.get(option, NOTHING)) for option in places]
    return [one for one in found if one.before != one.now]


def flat_options(values: Any, path: str) -> dict[str, Any]:
    """Return the leaves of nested dataclasses, dicts and lists by their places below `path`."""
    return dict(_flat(dataclasses.asdict(values) if dataclasses.is_dataclass(values) else values, path))


def _flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    elif isinstance(values, list) and values:
        for i, value in enumerate(values):
            yield from _flat(value, f"{path}[{i}]")
    else:
        yield path, values


def _filled(hint: Any, value: Any) -> Any:
    """Give the dataclasses within a plain value the options that it lacks, where these have a default."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        filled = {name: _filled(hints.get(name), item) for name, item in value.items()}
        for field in dataclasses.fields(hint):
            if field.name not in filled and (default := _default(field)) is not dataclasses.MISSING:
                filled[field.name] = default
        return filled
    if isinstance(value, list):
        element = next((arg for arg in _within(hint) if dataclasses.is_dataclass(arg)), None)
        return [_filled(element, item) for item in value]
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value if value is dataclasses.MISSING else json.loads(json.dumps(_plain(value)))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _within(hint: Any) -> Iterator[Any]:
    """Yield a type and every type that it is made of."""
    yield hint
    for arg in typing.get_args(hint):
        yield from _within(arg)
