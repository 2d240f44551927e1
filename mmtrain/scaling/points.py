"""`points.jsonl`: losses that a sweep measured, one object a line; what a sweep hands to the fit of scaling laws."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.durable import write_text
from mmtrain.errors import ConfigError, nearest

POINTS_NAME = "points.jsonl"


@dataclass(frozen=True)
class Point:
    """One measured loss of one run: at its end, or at a validation on the way.

    Attributes:
        architecture: `softmax`, `lightning`, `hybrid` (which the paper has laws of), or a label of your own.
        run: name of the run; points of one run are one training curve.
        parameters: of the model, without both embedding matrices.
        activated: parameters that one token meets, without both embedding matrices; `parameters` of a dense model.
        experts: routed experts of a layer, 0 for a dense model.
        tokens: trained on so far.
        flops: useful operations of training so far, forward and backward (`mmtrain.model.flops`).
        loss: of the validation, in nats a token.
        group: label of the isoFLOP group, whose runs share one compute budget; None outside such groups.
        learning_rate: peak of the schedule.
        batch_tokens: tokens of an optimizer step.
        final: whether the run ended here, its learning rate decayed as planned.
    """

    architecture: str
    run: str
    parameters: float
    activated: float
    experts: int
    tokens: float
    flops: float
    loss: float
    group: str | None
    learning_rate: float
    batch_tokens: float
    final: bool


FIELDS = tuple(field.name for field in dataclasses.fields(Point))
_POSITIVE = ("parameters", "activated", "tokens", "flops", "loss", "learning_rate", "batch_tokens")


def read_points(path: Path) -> list[Point]:
    """Read the points of a sweep.

    Args:
        path: the file, or the sweep's folder that holds it.

    Raises:
        ConfigError: there is no such file or no point in it, or a line is not a point: which line and which field.
    """
    path = Path(path)
    path = path / POINTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise ConfigError("points", path, "there is no such file", "give the folder of a sweep that has ended a run")
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            points.append(_parse(line, f"{path}:{number}"))
    if not points:
        raise ConfigError("points", path, "the file has no point", "let a run of the sweep end first")
    return points


def write_points(folder: Path, points: Iterable[Point]) -> Path:
    """Write all points of a sweep in one atomic replacement, and return the path of the file.

    Raises:
        ConfigError: a point cannot be read back: which one and which field; nothing is written.
    """
    points = list(points)
    for number, point in enumerate(points, 1):
        _check(dataclasses.asdict(point), f"point {number}")
    path = Path(folder) / POINTS_NAME
    lines = [json.dumps(dataclasses.asdict(point), allow_nan=False) + "\n" for point in points]
    write_text(path, "".join(lines))
    return path


def _parse(line: str, where: str) -> Point:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError("points", where, f"the line is not JSON ({error})", "let the sweep write it anew") from None
    if not isinstance(record, dict):
        raise ConfigError("points", where, "the line is not an object", f"it has the fields {', '.join(FIELDS)}")
    if missing := [name for name in FIELDS if name not in record]:
        raise ConfigError("points", where, f"the field {missing[0]} is missing", "let the sweep write the point anew")
    if unknown := [name for name in record if name not in FIELDS]:
        raise ConfigError("points", where, f"the field {unknown[0]} is unknown", nearest(unknown[0], FIELDS))
    _check(record, where)
    return Point(**record)


def _check(record: dict[str, Any], where: str) -> None:
    """Refuse a value of the wrong kind, and sizes that contradict each other."""
    for name in _POSITIVE:
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            fix = "leave out points of runs that diverged" if name == "loss" else "count it as the field's meaning says"
            raise ConfigError(f"points.{name}", value, f"{where} wants a positive finite number", fix)
    for name in ("architecture", "run"):
        if not isinstance(record[name], str) or not record[name]:
            raise ConfigError(f"points.{name}", record[name], f"{where} wants a text", "name it")
    if not isinstance(record["group"], str | None):
        raise ConfigError("points.group", record["group"], f"{where} wants a text or null", "name the group")
    if not isinstance(record["final"], bool):
        raise ConfigError("points.final", record["final"], f"{where} wants true or false", "say whether the run ended")
    experts = record["experts"]
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 0:
        raise ConfigError("points.experts", experts, f"{where} wants 0 or more", "0 is a dense model")
    if record["activated"] > record["parameters"]:
        problem = f"{where} has more activated parameters than parameters ({record['parameters']:g})"
        raise ConfigError("points.activated", record["activated"], problem, "count both without embeddings")
