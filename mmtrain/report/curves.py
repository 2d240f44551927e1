"""Figures of a run's steps as curves: thinned out to buckets of steps, each with its least, mean and largest value.

Spikes survive, whatever the length of the run. Legend: N steps, B buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from mmtrain.report.encode import packed
from mmtrain.report.read_run import Record, RunData, number

FIGURES = (
    "loss", "aux_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "step_s", "memory_gib", "memory_predicted_gib",
    "drop_rate", "drop_rate_alone", "cp_balance", "image_balance", "exchange_s", "exchange_hidden", "seq_len",
    "rope_base",
)  # fmt: skip
OF_EXPERTS = ("aux_loss", "drop_rate", "drop_rate_alone")
BUCKETS = 1000
"""Of a curve at first sight: least and largest of each are 2,000 points."""
FINE_BUCKETS = 10_000
FINE = ("loss", "grad_norm", "tokens_per_s")
"""Figures that a page has in `FINE_BUCKETS` too, for who zooms in."""


def curves(run: RunData) -> dict[str, Any]:
    """Return places and figures of a run's steps: ``levels``, coarse first, each with ``size`` (steps of a bucket),
    ``step``, ``tokens``, ``hours``, and ``figures`` by name with ``mean`` and, of buckets of several steps, ``low`` and
    ``high``; and ``last``, each figure at the last step that has it.
    """
    places = step_places(run.steps)
    found = {name: column(run.steps, name) for name in FIGURES}
    found["batch_tokens"] = found["seq_len"] * column(run.steps, "rows")
    found = {name: values for name, values in found.items() if np.isfinite(values).any()}
    if not any(record.get("router_load") for record in run.steps):  # without experts these are zeros
        found = {name: values for name, values in found.items() if name not in OF_EXPERTS}
    levels = [_level(places, found, BUCKETS)]
    if len(run.steps) > BUCKETS:
        levels.append(_level(places, {name: found[name] for name in FINE if name in found}, FINE_BUCKETS))
    return {"levels": levels, "last": {name: last_of(values) for name, values in found.items()}}


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """Return a figure of all records, float64 [N]; NaN where it is missing or no number."""
    values = (record.get(name) for record in records)
    return np.array([value if number(value) else np.nan for value in values], dtype=np.float64)


def last_of(values: np.ndarray) -> float:
    """Return the last value that is a number; there is one."""
    return float(values[np.flatnonzero(np.isfinite(values))[-1]])


def step_places(steps: Sequence[Record]) -> dict[str, np.ndarray]:
    """Return where each step lies on the three axes: its number, tokens so far, hours since the first step began."""
    times = np.array([_seconds(record.get("time")) for record in steps])
    taken = np.nan_to_num(column(steps, "step_s"))
    if not np.isfinite(times).all():  # an old or a patched record: as if steps had followed one another
        times = np.cumsum(taken)
    hours = np.maximum.accumulate(times - times[0] + taken[0]) / 3600
    return {"step": column(steps, "step"), "tokens": column(steps, "tokens"), "hours": hours}


def place_of(record: Record, places: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
    """Return step, tokens and hours of a record that belongs to a step, by the step at or before it."""
    at = int(np.clip(np.searchsorted(places["step"], record["step"], side="right") - 1, 0, len(places["step"]) - 1))
    return float(record["step"]), float(places["tokens"][at]), float(places["hours"][at])


def _level(places: Mapping[str, np.ndarray], figures: Mapping[str, np.ndarray], most: int) -> dict[str, Any]:
    count = len(places["step"])
    size = -(-count // most)
    ends = np.minimum(np.arange(size, count + size, size), count) - 1
    made: dict[str, Any] = {"size": size, **{name: packed(place[ends], "f8") for name, place in places.items()}}
    made["figures"] = {name: _bucketed(values, size) for name, values in figures.items()}
    return made


def _bucketed(values: np.ndarray, size: int) -> dict[str, Any]:
    if size == 1:
        return {"mean": packed(values)}
    full = np.full(-(-len(values) // size) * size, np.nan)
    full[: len(values)] = values
    table_BN = full.reshape(-1, size)
    known_BN = np.isfinite(table_BN)
    none_B = ~known_BN.any(axis=1)
    low_B = np.where(known_BN, table_BN, np.inf).min(axis=1)
    high_B = np.where(known_BN, table_BN, -np.inf).max(axis=1)
    mean_B = np.where(known_BN, table_BN, 0.0).sum(axis=1) / np.maximum(known_BN.sum(axis=1), 1)
    return {name: packed(np.where(none_B, np.nan, each)) for name, each in
            (("low", low_B), ("mean", mean_B), ("high", high_B))}  # fmt: skip


def _seconds(time: Any) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError):
        return float("nan")
