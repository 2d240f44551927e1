"""`sweep.json`: what a sweep is, so that a later launch under its name goes on with the same sweep or is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.durable import write_text
from mmtrain.config.sweep import FREE_IN_SWEEP
from mmtrain.errors import ConfigError
from mmtrain.runs.sweep.command import Request
from mmtrain.runs.sweep.grid import SweepRun

SHOWN = 4  # differences that a refusal names


def definition_of(request: Request, runs: Sequence[SweepRun]) -> dict[str, Any]:
    """Return what makes a sweep what it is, as JSON data: its options but for how runs are started, and its runs."""
    options = {
        field.name: getattr(request.sweep, field.name)
        for field in dataclasses.fields(request.sweep)
        if not FREE_IN_SWEEP.items() <= field.metadata.items() and field.name not in ("variants", "overrides")
    }
    options["variants"] = [one for one in request.sweep.variants if one.name in request.sweep.architectures]
    options["run"] = _by_option(request.overrides)
    options["axes"] = {axis.option: list(axis.values) for axis in request.axes}
    named = {run.name: list(run.overrides) for run in runs}
    return json.loads(json.dumps({"options": _plain(options), "runs": named}))


def check_definition(path: Path, wanted: dict[str, Any]) -> None:
    """Refuse to go on with another sweep of this name.

    Raises:
        ConfigError: it differs, or its definition cannot be read.
    """
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("sweep.name", path.parent.name, f"{path} is not readable ({error})",
                          "give another sweep.name") from error  # fmt: skip
    different = _differences(found.get("options", {}), wanted["options"])
    if not different and found.get("runs") != wanted["runs"]:
        different = ["the runs that this version makes of it"]
    if different:
        more = f", and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise ConfigError("sweep.name", path.parent.name,
                          f"{path.parent} holds another sweep: {', '.join(different[:SHOWN])}{more}",
                          "give another sweep.name, or the options that it was started with")  # fmt: skip


def write_definition(path: Path, wanted: dict[str, Any]) -> None:
    """Write the definition of a sweep that begins.

    Raises:
        OSError: it cannot be written.
    """
    if not path.is_file():
        write_text(path, json.dumps(wanted, indent=1) + "\n")


def _by_option(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides by option, the last of each."""
    return {text.partition("=")[0].lstrip("+"): text.partition("=")[2] for text in overrides}


def _differences(before: Any, now: Any, path: str = "sweep") -> list[str]:
    """Name the options whose values differ, with both; sizes and variants by their names."""
    before, now = _by_name(before), _by_name(now)
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys([*before, *now]):
            inner = key if path in ("sweep.run", "sweep.axes") else f"{path}.{key}"
            found += _differences(before.get(key, "(absent)"), now.get(key, "(absent)"), inner)
        return found
    return [] if before == now else [f"{path} was {_brief(before)} and is {_brief(now)}"]


def _by_name(value: Any) -> Any:
    """Return a list of records that have names as a dict of them; anything else as it is."""
    named = isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value)
    return {one["name"]: one for one in value} if named else value


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(inner) for key, inner in vars(value).items()}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
