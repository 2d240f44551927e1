"""Diagnosis of a command line: which option cannot work, and which one was meant.

Names are checked before Hydra composes; what Hydra then refuses all together is taken apart here.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.config import PretrainConfig
from mmtrain.config.elsewhere import elsewhere
from mmtrain.config.option_tree import option_paths, option_type, options_of, without_none
from mmtrain.config.overrides import Given, text_kind
from mmtrain.errors import ConfigError, nearest

_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
               "--experimental-rerun"}  # fmt: skip
_ALONE = {"--help", "-h", "--plan", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m",
          "--info", "-i", "--shell-completion", "-sc"}  # fmt: skip
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def check_flags(flags: Sequence[str]) -> None:
    """Refuse what is neither ``option=value`` nor a flag, and flags that exclude each other (ConfigError)."""
    wants_value = False
    for flag, before in zip(flags, ["", *flags], strict=False):
        if wants_value or (before in ("--info", "-i") and flag in _INFO):
            wants_value = False
            continue
        name, equals, value = flag.partition("=")
        wants_value = name in _WITH_VALUE and not equals
        if name in _WITH_VALUE or (name in _ALONE and not equals):
            continue
        option = name.lstrip("-").replace("-", "_")
        shown = flag if not equals else value
        if flag.startswith("-"):
            found = elsewhere(option) or nearest(option, _WITH_VALUE | _ALONE | set(option_paths(PretrainConfig)))
            fix = f"write {option}={value or '...'}" if option_type(PretrainConfig, option) is not None else found
            raise ConfigError(name, shown, "not a flag; options are written option=value, without dashes", fix)
        raise ConfigError("command line", flag, "neither option=value nor a flag", "see --help")
    if {"-m", "--multirun"} & set(flags) and any(flag.split("=")[0] in ("--cfg", "-c") for flag in flags):
        raise ConfigError("--cfg", "with -m", "a sweep has many configurations", "leave out -m and the other values")


def check_name(given: Given, config_dir: Path) -> None:
    """Refuse an option that does not exist, naming the one that was meant (ConfigError)."""
    group = given.option.split(".")[0]
    if given.hydra.startswith("~") and "." in given.option:
        raise ConfigError(f"~{given.option}", "(removed)", "options cannot be taken out",
                          f"give {given.option}=null where null is allowed, or leave it at its default")  # fmt: skip
    if group == "hydra" or "/" in given.option or "@" in given.option or (config_dir / given.option).is_dir():
        return
    wrong = _unknown_option(given.option, given.value)
    if wrong is not None:
        raise wrong


def diagnose(overrides: Sequence[Given], config_dir: Path, sweeping: bool) -> ConfigError | None:
    """Find the first override that cannot work, after Hydra has refused them all together.

    Args:
        overrides: the overrides of the command line.
        config_dir: the folder of YAML groups, for the known choices.
        sweeping: several values of one option are allowed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for given in overrides:
        option, value = given.option, given.value
        try:
            parsed = OverridesParser.create().parse_override(given.hydra)
        except HydraException:
            return ConfigError(option, value, "not readable", f"quote special characters: \"{option}='...'\"")
        if option.split(".")[0] == "hydra":
            continue
        if parsed.is_sweep_override() and not sweeping:
            return ConfigError(option, value, "several values", _one_value(option, value))
        wrong = _wrong_choice(option, value, config_dir) or _unknown_option(option, value)
        if wrong is not None:
            return wrong
        if parsed.is_add() and option != "stage" and re.search(r"\.\d+(\.|$)", option) is None:
            return ConfigError(option, value, "already set by the configuration", f"leave out the +: {option}={value}")
    for given in overrides:
        if (position := re.search(r"^(.*?)\.(\d+)(\.|$)", given.option)) is not None:
            problem = f"{position[1]} has no position {position[2]} (they count from 0)"
            fix = f"name one that is there, or write the whole list: {position[1]}=[...]"
            return ConfigError(given.option, given.value, problem, fix)
    return None


def _one_value(option: str, value: str) -> str:
    if text_kind(option_type(PretrainConfig, option)) is not None:
        return f"add -m to sweep over them, or quote the text: \"{option}='{value}'\""
    return "add -m to sweep over them, or write a list as [a,b]"


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
        kind = without_none(kind)
        if typing.get_origin(kind) is list and part.isdigit():
            kind = typing.get_args(kind)[0]
            continue
        names = options_of(kind)
        if part not in names:
            above = ".".join([*parts[:depth], ""])
            fix = elsewhere(part) or elsewhere(option) or _suggest(part, above, list(names))
            return ConfigError(option, value, "unknown option", fix)
        kind = names[part]
    return None


def _suggest(name: str, above: str, names: list[str]) -> str:
    """Suggest an option: of equal name elsewhere (the least nested), of a close name here, elsewhere, or all here."""
    paths = list(option_paths(PretrainConfig))
    same = [path for path in paths if path.split(".")[-1] == name]
    same = [path for path in same if path.count(".") == min(one.count(".") for one in same)]
    here = [above + close for close in difflib.get_close_matches(name, names, n=1, cutoff=0.6)]
    last_parts = {path.split(".")[-1] for path in paths}
    close_parts = difflib.get_close_matches(name, last_parts, n=1, cutoff=0.75)
    close = [path for path in paths if path.split(".")[-1] in close_parts]
    for found in (same, here, close):
        if found:
            return "did you mean " + " or ".join(f"'{path}'" for path in found) + "?"
    return nearest(name, names) if names else f"'{above.rstrip('.')}' has no options of its own"
