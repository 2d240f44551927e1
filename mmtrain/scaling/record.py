"""A fit as plain values, for `fit.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmtrain.scaling.fit import ArchitectureFit, FitOptions
from mmtrain.scaling.paper import PFLOP_S_DAY, TABLE_2
from mmtrain.scaling.surface import SurfaceFit


def record_of(fits: Sequence[ArchitectureFit], options: FitOptions) -> dict[str, Any]:
    """Return options, units, all fits by label, and the paper's laws."""
    return {
        "options": plain(options),
        "flop_of_a_unit_of_C": PFLOP_S_DAY,
        "fits": {fit.label: _fit(fit) for fit in fits},
        "paper_table_2": plain(TABLE_2),
    }


def plain(value: Any) -> Any:
    """Return dataclasses as objects, and numbers that JSON lacks as null."""
    if isinstance(value, SurfaceFit):
        names = ("coefficients", "scatter", "residuals", "objective", "agreeing", "starts", "resamples")
        return {"form": value.law.form, **{name: plain(getattr(value, name)) for name in names}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fit(fit: ArchitectureFit) -> dict[str, Any]:
    record = {field.name: plain(getattr(fit, field.name)) for field in dataclasses.fields(fit)}
    for own, one in zip(record["held_out"], fit.held_out, strict=True):
        own["error"] = one.error
    return {
        **{name: item for name, item in record.items() if name not in ("points", "ends", "surface_points")},
        "points": len(fit.points),
    }
