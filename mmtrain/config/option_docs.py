"""Meaning, type, default and allowed values of every option, read from the dataclasses and the YAML groups."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config import PretrainConfig
from mmtrain.config.option_tree import options_of, without_none
from mmtrain.config.schema import Count

_TYPE_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Count: "count", type(None): "null"}


@dataclass(frozen=True)
class OptionDoc:
    """One option.

    Attributes:
        name: dotted; positions in lists are ``[0]``.
        type: in words.
        default: as it is written in YAML; None where there is none.
        allowed: the allowed values in words; empty where any of the type will do.
        meaning: one or more sentences.
    """

    name: str
    type: str
    default: str | None
    allowed: str
    meaning: str


@dataclass(frozen=True)
class GroupDoc:
    """One group of options.

    Attributes:
        name: of the group, as options begin with it.
        summary: what the group is.
        choices: its YAML files.
        chosen: the one that is taken when none is named; None for a group that is no folder.
        options: all of it, those inside lists after the others.
    """

    name: str
    summary: str
    choices: list[str]
    chosen: str | None
    options: list[OptionDoc]


def group_docs(config_dir: Path) -> list[GroupDoc]:
    """Return all groups, in the order of their declaration.

    Args:
        config_dir: the folder of YAML groups, whose defaults are shown.
    """
    defaults, chosen = read_defaults(config_dir)
    docs = []
    for name, kind in options_of(PretrainConfig).items():
        choices = sorted(path.stem for path in (config_dir / name).glob("*.yaml"))
        options = list(_options(kind, name, defaults.get(name, {})))
        docs.append(GroupDoc(name, _summary(kind), choices, chosen.get(name), options))
    return docs


def meanings(kind: type) -> dict[str, str]:
    """Return the text on each field in the ``Attributes:`` of a dataclass's docstring."""
    _, _, section = inspect.getdoc(kind).partition("Attributes:\n")  # type: ignore[union-attr]
    found: dict[str, str] = {}
    name = None
    for line in section.splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name is not None and line.startswith("        "):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def read_defaults(config_dir: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configuration without overrides as nested dicts, and the YAML file that each group takes."""
    root = _load(config_dir / "pretrain.yaml")
    chosen = {"stage": "pretrain"}
    for entry in root.get("defaults", []):
        if isinstance(entry, dict):
            chosen |= {group: name for group, name in entry.items() if not group.startswith("override ")}
    values = {group: _with_parents(config_dir / group, name) for group, name in chosen.items()}
    return {**values, "run": root["run"]}, chosen


def _with_parents(folder: Path, name: str) -> dict[str, Any]:
    own = _load(folder / f"{name}.yaml")
    values: dict[str, Any] = {}
    for parent in own.pop("defaults", []):
        values |= _with_parents(folder, parent) if parent != "_self_" else {}
    return values | own


def _load(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text()) or {}


def _summary(kind: type) -> str:
    return _plain(" ".join(inspect.getdoc(kind).partition("\n\n")[0].split()))  # type: ignore[union-attr]


def _options(kind: type, path: str, defaults: dict[str, Any] | None) -> Iterator[OptionDoc]:
    """Yield the options of a dataclass, then those of the groups inside its lists."""
    hints, texts = typing.get_type_hints(kind), meanings(kind)
    inner: list[tuple[type, str]] = []
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"{path}.{field.name}"
        item = typing.get_args(without_none(hint))[0] if typing.get_origin(without_none(hint)) is list else None
        if dataclasses.is_dataclass(item):
            inner.append((typing.cast("type", item), f"{name}[0]"))
        if dataclasses.is_dataclass(hint):
            yield from _options(typing.cast("type", hint), name, (defaults or {}).get(field.name))
            continue
        default = _default(field, defaults)
        yield OptionDoc(name, _type(hint), default, _allowed(field), _plain(texts[field.name]))
        if dataclasses.is_dataclass(without_none(hint)) and "[" not in name:  # a group that may be null
            yield from _options(typing.cast("type", without_none(hint)), name, (defaults or {}).get(field.name))
    for item, name in inner:
        yield from _options(item, name, None)


def _default(field: dataclasses.Field[Any], defaults: dict[str, Any] | None) -> str | None:
    """Return the default that the YAML files give, else the dataclass's own."""
    if defaults is not None and field.name in defaults:
        value = defaults[field.name]
        if isinstance(value, list) and value:
            if isinstance(value[0], dict):
                return f"{len(value)} in the stage's file"
            return f"[{', '.join(map(_yaml, value))}]"
        return None if value == "???" else _yaml(value)
    if field.default is not dataclasses.MISSING:
        return _yaml(field.default)
    if field.default_factory is dataclasses.MISSING:
        return None
    made = field.default_factory()
    return f"a list of {len(made)}" if isinstance(made, list) and made else "[]"


def _yaml(value: Any) -> str:
    """Return a value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(hint: Any) -> str:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        item = args[0]
        return "list of groups" if dataclasses.is_dataclass(item) else f"list of {_type(item)}"
    if args:
        return " or ".join(_type(arg) for arg in args)
    return "group" if dataclasses.is_dataclass(hint) else _TYPE_NAMES[hint]


def _allowed(field: dataclasses.Field[Any]) -> str:
    names, limits = field.metadata.get("one_of"), field.metadata.get("range")
    parts = [str(limits)] if limits is not None else []
    return " or ".join([*parts, *([", ".join(names)] if names else [])])


def _plain(text: str) -> str:
    """Drop the marks of reStructuredText."""
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda match: match[1].rsplit(".", 1)[-1], text)
    return text.replace("``", "`")
