"""Load of every expert over a run, and how evenly it falls on the ranks. Legend: T snapshots, L layers, E experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmtrain.report.curves import place_of
from mmtrain.report.encode import packed
from mmtrain.report.read_run import Record, RunData, number, option

MOST_CELLS = 200_000
SCALE = 1000
"""Loads are kept as whole thousandths of the even share, 65 times of it at most."""


def expert_loads(run: RunData, places: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Return the load table of a run: ``shape`` [T, L, E], ``load`` (thousandths of the even share), where each
    snapshot was taken, ``entropy`` and ``drops`` by layer at the last one; None without experts.
    """
    found = _snapshots(run)
    if not found:
        return None
    cells = len(found[0]["router_load"]) * len(found[0]["router_load"][0])
    keep = max(2, MOST_CELLS // cells)
    if len(found) > keep:
        found = [found[i] for i in sorted({round(i * (len(found) - 1) / (keep - 1)) for i in range(keep)})]
    table_TLE = _table(found)
    at = [place_of(record, places) for record in found]
    return {
        "shape": list(table_TLE.shape),
        "load": packed(np.clip(np.round(np.nan_to_num(table_TLE) * SCALE), 0, 65535).ravel(), "u2"),
        **{name: packed([one[i] for one in at], "f8") for i, name in enumerate(("step", "tokens", "hours"))},
        "entropy": _numbers(found[-1].get("router_entropy")),
        "drops": _numbers(found[-1].get("drop_rate_per_layer")),
    }


def rank_load(run: RunData, places: dict[str, np.ndarray]) -> list[tuple[float, ...]]:
    """Return (step, tokens, hours, ratio) of each snapshot: assignments to the busiest of the ranks that share the
    experts of a layer, over their mean, in the layer where that is largest. Empty where no ranks share them.
    """
    ways = option(run.config, "parallel", "ep")
    found = _snapshots(run)
    if not found or not number(ways) or ways < 2 or len(found[0]["router_load"][0]) % ways:
        return []
    table_TLE = _table(found)
    ranks_TLR = table_TLE.reshape(*table_TLE.shape[:2], int(ways), -1).sum(axis=-1)  # experts lie in blocks
    mean_TL = np.maximum(ranks_TLR.mean(axis=-1), 1e-12)
    worst_T = (ranks_TLR.max(axis=-1) / mean_TL).max(axis=-1)
    return [(*place_of(record, places), float(worst)) for record, worst in zip(found, worst_T, strict=True)]


def _snapshots(run: RunData) -> list[Record]:
    """Records that hold a whole table of loads, of the shape that the last one has."""
    found = [record for record in run.steps if _is_table(record.get("router_load"))]
    shape = _shape(found[-1]) if found else None
    return [record for record in found if _shape(record) == shape]


def _is_table(loads: Any) -> bool:
    rows = isinstance(loads, list) and bool(loads) and all(isinstance(row, list) and row for row in loads)
    return rows and len({len(row) for row in loads}) == 1


def _shape(record: Record) -> tuple[int, int]:
    return len(record["router_load"]), len(record["router_load"][0])


def _table(found: list[Record]) -> np.ndarray:
    return np.array([[[load if number(load) else np.nan for load in row] for row in record["router_load"]]
                     for record in found])  # fmt: skip


def _numbers(values: Any) -> list[float | None]:
    return [value if number(value) else None for value in values] if isinstance(values, list) else []
