"""A run's folder as plain records: steps, each once, and what lies between them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.log.console import LOG_NAME
from mmtrain.log.ledger import FILE_NAME as LEDGER
from mmtrain.log.metrics import FILE_NAME as METRICS
from mmtrain.log.metrics import read_counted
from mmtrain.report.evaluations import read_evaluations

Record = dict[str, Any]

CONFIG, LAUNCHES = "config.json", "launches.jsonl"
LOG_LINES = 400
"""Last lines of the log that are read."""
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")


@dataclass
class RunData:
    """What the folder of a run records.

    Attributes:
        name: of the run, as a page calls it.
        path: the folder.
        steps: records of optimizer steps by step, each once: the last that was written of it.
        validations, needles, layouts, paces: the other records of `metrics.jsonl`, by step.
        ledger: records of `ledger.jsonl`.
        launches: records of `launches.jsonl`, as they were written.
        config: every option; empty where it cannot be read.
        evaluations: results of offline evaluations, as `evaluations.read_evaluations` returns them.
        log: time and text of the last lines of the log.
        damaged: lines that are no record, by the name of their file.
        repeated: records of steps that a later record of the same step replaced.
    """

    name: str
    path: Path
    steps: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    needles: list[Record] = field(default_factory=list)
    layouts: list[Record] = field(default_factory=list)
    paces: list[Record] = field(default_factory=list)
    ledger: list[Record] = field(default_factory=list)
    launches: list[Record] = field(default_factory=list)
    config: Record = field(default_factory=dict)
    evaluations: list[Record] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    damaged: dict[str, int] = field(default_factory=dict)
    repeated: int = 0


def read_run(path: Path) -> RunData:
    """Read the folder of a run.

    Raises:
        ConfigError: there is no such folder, it is no run's, or the run has not recorded a step.
    """
    if not path.is_dir():
        raise ConfigError("run", path, "no such folder", "give the folder of a run, runs/NAME")
    if not (path / METRICS).is_file():
        is_run = (path / CONFIG).is_file()
        problem = "has no metrics.jsonl yet" if is_run else "is no run's folder: it has no metrics.jsonl"
        fix = "wait for its first step" if is_run else "give the folder of a run, runs/NAME, or of a sweep"
        raise ConfigError("run", path, problem, fix)
    run = RunData(path.resolve().name, path)
    _sort(run, _lines(run, METRICS))
    if not run.steps:
        raise ConfigError("run", path, f"{METRICS} records no step", "wait for the run's first step")
    run.ledger, run.launches = _lines(run, LEDGER), _lines(run, LAUNCHES)
    run.config, run.log = _config(path / CONFIG), _log(path / LOG_NAME)
    run.evaluations, damaged = read_evaluations(path)
    run.damaged |= dict.fromkeys(damaged, 1)
    return run


def _lines(run: RunData, name: str) -> list[Record]:
    """Read a file of records that may not be there; lines that are none are counted."""
    if not (run.path / name).is_file():
        return []
    records, damaged = read_counted(run.path / name)
    if damaged:
        run.damaged[name] = damaged
    return records


def _sort(run: RunData, records: list[Record]) -> None:
    """Part the records of `metrics.jsonl` by their kind."""
    kinds: dict[str, dict[int, Record]] = {"steps": {}, "validations": {}, "needles": {}, "layouts": {}, "paces": {}}
    marks = {"loss": "steps", "val_loss": "validations", "needle_cells": "needles", "layout": "layouts",
             "pace_product_s": "paces"}  # fmt: skip
    strange = 0
    for record in records:
        kind = next((kind for mark, kind in marks.items() if mark in record), None)
        step = record.get("step")
        if kind is None or type(step) is not int or (kind == "steps" and not number(record.get("tokens"))):
            strange += 1
            continue
        run.repeated += kind == "steps" and step in kinds[kind]
        kinds[kind][step] = record
    for kind, found in kinds.items():
        setattr(run, kind, [found[step] for step in sorted(found)])
    if strange:
        run.damaged[METRICS] = run.damaged.get(METRICS, 0) + strange


def number(value: Any) -> bool:
    """Whether a value of a record is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def option(config: Mapping[str, Any], *place: str) -> Any:
    """Return an option of a recorded configuration; None where it has none there."""
    found: Any = config
    for name in place:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _config(path: Path) -> Record:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _log(path: Path) -> list[tuple[str, str]]:
    """Read the end of a log: a long run's is large."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 400 * LOG_LINES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    found = (_LOG_LINE.fullmatch(line) for line in text.splitlines())
    return [(one[1], one[2]) for one in found if one][-LOG_LINES:]
