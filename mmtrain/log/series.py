"""Records of `metrics.jsonl` as the flat series that trackers draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def series(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each series: lists of one number a layer become one a layer, deeper ones stay out."""
    for key, value in record.items():
        if isinstance(value, list | tuple):
            numbers = [(i, item) for i, item in enumerate(value) if isinstance(item, int | float)]
            yield from ((f"{key}/layer_{i:02d}", item) for i, item in numbers)
        elif value is not None:
            yield key, value
