"""Diagnosis of a command line that Hydra refused: which option is wrong, and which one was meant."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError, nearest


def diagnose(overrides: list[str], config_dir: Path, sweeping: bool) -> ConfigError | None:
    """Find the first override that cannot work, after Hydra has refused them all together.

    Args:
        overrides: the overrides of the command line.
        config_dir: the folder of YAML groups, for the known choices.
        sweeping: several values of one option are allowed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for text in overrides:
        option, _, value = text.lstrip("+~").partition("=")
        try:
            parsed = OverridesParser.create().parse_override(text)
        except HydraException:
            return ConfigError(option, value, "not readable", "write option=value, quoting special characters")
        if option.split(".")[0] == "hydra":
            continue
        if parsed.is_sweep_override() and not sweeping:
            return ConfigError(option, value, "several values", "add -m to sweep over them, or write a list as [a,b]")
        wrong = _wrong_choice(option, value, config_dir) or _unknown_option(option, value)
        if wrong is not None:
            return wrong
        if parsed.is_add() and option != "stage":
            return ConfigError(option, value, "already set by the configuration", f"leave out the +: {option}={value}")
    return None


def _wrong_choice(group: str, value: str, config_dir: Path) -> ConfigError | None:
    """Check the values given to a group of YAML files, if `group` is one."""
    if not (config_dir / group).is_dir():
        return None
    choices = [path.stem for path in (config_dir / group).glob("*.yaml")]
    for choice in value.split(","):
        if choice.strip() not in choices:
            return ConfigError(group, choice.strip(), "not a known choice", nearest(choice.strip(), choices))
    return None


def _unknown_option(option: str, value: str) -> ConfigError | None:
    """Walk the typed configuration along `option`; name the closest option where the walk ends."""
    kind: Any = PretrainConfig
    parts = option.split(".")
    for depth, part in enumerate(parts):
        if typing.get_origin(kind) is list and part.isdigit():
            kind = typing.get_args(kind)[0]
            continue
        names = _options(kind)
        if part not in names:
            above = ".".join([*parts[:depth], ""])
            return ConfigError(option, value, "unknown option", _suggest(part, above, list(names)))
        kind = names[part]
    return None


def _suggest(name: str, above: str, names: list[str]) -> str:
    """Suggest an option: of equal name elsewhere in the tree, of a close name here, then elsewhere, or all here."""
    paths = list(_paths(PretrainConfig))
    same = [path for path in paths if path.split(".")[-1] == name]
    here = [above + close for close in difflib.get_close_matches(name, names, n=1, cutoff=0.6)]
    last_parts = {path.split(".")[-1] for path in paths}
    close_parts = difflib.get_close_matches(name, last_parts, n=1, cutoff=0.75)
    elsewhere = [path for path in paths if path.split(".")[-1] in close_parts]
    for found in (same, here, elsewhere):
        if found:
            return "did you mean " + " or ".join(f"'{path}'" for path in found) + "?"
    return nearest(name, names) if names else f"'{above.rstrip('.')}' has no options of its own"


def _options(kind: Any) -> dict[str, Any]:
    """Return the options of a dataclass and their types; none for other types."""
    if not dataclasses.is_dataclass(kind):
        return {}
    return {name: _without_none(hint) for name, hint in typing.get_type_hints(kind).items()}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _paths(kind: Any, above: str = "") -> Iterator[str]:
    """Yield the dotted name of every option that is not a group."""
    for name, hint in _options(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _paths(hint, f"{above}{name}.")
        else:
            yield above + name
