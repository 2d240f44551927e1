"""Arrays of numbers as a page holds them: base64 of little-endian bytes, a third of the size of digits."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS = {"f4": "<f4", "f8": "<f8", "u2": "<u2"}


def packed(values: Sequence[float] | np.ndarray, kind: str = "f4") -> dict[str, str]:
    """Return an array as ``{kind: base64}``.

    Args:
        values: numbers; NaN where there is none.
        kind: "f4", "f8" or "u2", for what JavaScript calls Float32Array, Float64Array and Uint16Array.
    """
    with np.errstate(over="ignore"):
        array = np.asarray(values, dtype=np.float64).astype(KINDS[kind])
    return {kind: base64.b64encode(array.tobytes()).decode()}


def unpacked(made: dict[str, str]) -> np.ndarray:
    """Return the array that :func:`packed` packed."""
    ((kind, text),) = made.items()
    return np.frombuffer(base64.b64decode(text), dtype=KINDS[kind])


def script_json(data: Any) -> str:
    """Return data as JSON that may stand inside a ``<script>``: nothing in it can end the element or begin another."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
