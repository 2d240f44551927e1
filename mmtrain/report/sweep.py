"""A sweep's folder: the points that were fitted, and the fit, as they lie in `points.jsonl` and `fit.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.log.metrics import read_counted
from mmtrain.report.read_run import Record, number

POINTS, FIT = "points.jsonl", "fit.json"
MOST_FIGURES = 400
FIGURES = ("parameters", "activated", "experts", "tokens", "flops", "loss")


def is_sweep(path: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (path / POINTS).is_file() or (path / FIT).is_file()


def read_sweep(path: Path) -> dict[str, Any]:
    """Return ``name``, ``points``, ``damaged`` (lines that are no point), ``fit`` (its figures, flat), ``laws``, and
    ``notes``: what the fit doubts and what it could not fit.

    ``laws`` are those of loss over compute, coefficient times PFLOP/s-days to the power of an exponent.

    Raises:
        ConfigError: it holds no point.
    """
    points, damaged = read_counted(path / POINTS) if (path / POINTS).is_file() else ([], 0)
    kept = [made for record in points if (made := _point(record)) is not None]
    if not kept:
        raise ConfigError("sweep", path, f"{POINTS} holds no point with a loss", "fit the sweep first")
    fit = _read_fit(path / FIT)
    return {
        "name": path.resolve().name,
        "path": str(path),
        "points": kept,
        "damaged": damaged + len(points) - len(kept),
        "fit": [list(leaf) for leaf in _leaves(fit, "")][:MOST_FIGURES],
        "laws": _laws(fit, ""),
        "notes": _notes(fit),
    }


def _point(record: Record) -> Record | None:
    figures = {name: record[name] for name in FIGURES if number(record.get(name)) and math.isfinite(record[name])}
    if not {"loss", "flops"} <= set(figures) or figures["flops"] <= 0 or figures["loss"] <= 0:
        return None
    words = {name: str(record.get(name) or "") for name in ("architecture", "run", "group")}
    return {**words, **figures, "final": record.get("final") is not False}


def _read_fit(path: Path) -> Any:
    """Return the fit as it lies in the folder; an empty one where there is none or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _laws(value: Any, label: str) -> list[dict[str, Any]]:
    """Find the laws of loss over compute, wherever they lie: ``label``, ``kind``, ``beta`` and ``alpha``.

    A law is an entry `loss` with `beta` and `alpha` in an entry whose name ends in `laws`; its label is the `label` or
    `architecture` of the nearest entry around it.
    """
    if isinstance(value, list):
        return [law for one in value for law in _laws(one, label)]
    if not isinstance(value, dict):
        return []
    label = next((one for name in ("label", "architecture") if isinstance(one := value.get(name), str)), label)
    found = []
    for name, one in value.items():
        loss = one.get("loss") if isinstance(one, dict) and str(name).endswith("laws") else None
        beta, alpha = (
            (_estimate(loss.get(part)) for part in ("beta", "alpha")) if isinstance(loss, dict) else (None, None)
        )
        if beta is not None and alpha is not None:
            found.append({"label": label, "kind": str(name), "beta": beta, "alpha": alpha})
        found += _laws(one, label)
    return found


def _notes(fit: Any) -> list[list[str]]:
    """Return (label, kind, text) of every doubt and of every law that was not fitted."""
    found: list[list[str]] = []
    fits = fit.get("fits") if isinstance(fit, dict) else None
    for label, one in fits.items() if isinstance(fits, dict) else ():
        for name, kind in (("doubts", "doubtful"), ("refused", "not fitted")):
            lines = one.get(name) if isinstance(one, dict) else None
            found += [[str(label), kind, str(line)] for line in lines or [] if isinstance(lines, list)]
    return found


def _estimate(value: Any) -> float | None:
    """A number, or the `value` of one with its interval."""
    found = value.get("value") if isinstance(value, dict) else value
    return float(found) if number(found) and math.isfinite(found) else None


def _leaves(value: Any, place: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in _leaves(one, f"{place}.{key}" if place else str(key))]
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        return [leaf for i, one in enumerate(value) for leaf in _leaves(one, f"{place}[{i}]")]
    if isinstance(value, list):
        return [(place, ", ".join(_text(one) for one in value[:12]) + (", …" if len(value) > 12 else ""))]
    return [(place, _text(value))]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
