"""Numbers and names of a sweep, as its tables and folders have them."""

from __future__ import annotations

import re


def count_words(number: float) -> str:
    """Write a count in four digits at most: ``524K``, ``1.57M``, ``300B``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"


def batch_words(tokens: int) -> str:
    """Write a batch in powers of two where it is whole in them: ``64Ki``, ``4Mi``, ``300``."""
    for size, unit in ((2**20, "Mi"), (2**10, "Ki")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens}"


def time_words(seconds: float | None) -> str:
    """Write a time: ``45 s``, ``12 min``, ``3.4 h``; ``?`` where it is not known."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plain_name(text: str) -> str:
    """Make a folder's name of a text: letters, digits and ``. _ - =`` stay."""
    return re.sub(r"[^\w.=-]+", "_", text).strip("_.")
