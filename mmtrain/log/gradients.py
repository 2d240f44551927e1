"""`gradients.json`: fingerprints of every parameter's gradient at the first step of a launch, to compare runs by."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "gradients.json"


@dataclass(frozen=True)
class GradientRecord:
    """Fingerprints of one step's gradients, after reduction over ranks and before clipping.

    Attributes:
        precision: name of the dtype of the products, "float32" or "bfloat16".
        parameters: by the parameter's name in the whole model: norm of its gradient, then its projections.
    """

    precision: str
    parameters: Mapping[str, Sequence[float]]

    def write(self, run: Path) -> None:
        """Write the record into a run's folder; NaN and infinity become null."""
        plain = {name: [value if math.isfinite(value) else None for value in row]
                 for name, row in self.parameters.items()}  # fmt: skip
        (run / FILE_NAME).write_text(json.dumps({"precision": self.precision, "parameters": plain}) + "\n")

    @staticmethod
    def read(run: Path) -> GradientRecord:
        """Read the record of a run's folder; null becomes NaN."""
        found = json.loads((run / FILE_NAME).read_text())
        rows = {name: [math.nan if value is None else value for value in row]
                for name, row in found["parameters"].items()}  # fmt: skip
        return GradientRecord(found["precision"], rows)


def gradient_differences(reference: GradientRecord, other: GradientRecord, floor: float = 1e-5) -> dict[str, float]:
    """Estimate, by name, norm(other - reference) / norm(reference) of every parameter's gradient.

    A gradient whose norm is below `floor` of the norm of all of the reference's is measured by that instead: one that
    is zero but for rounding has no digits that could agree.

    Returns:
        For each parameter of either record; infinite where a number is missing, or a parameter of one of them.
    """
    whole = math.hypot(*(row[0] for row in reference.parameters.values()))
    found = {}
    for name in {**reference.parameters, **other.parameters}:
        first, second = reference.parameters.get(name), other.parameters.get(name)
        found[name] = math.inf if first is None or second is None else _difference(first, second, floor * whole)
    return found


def _difference(first: Sequence[float], second: Sequence[float], least: float) -> float:
    pairs = list(zip(first[1:], second[1:], strict=True))
    distance = math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs))
    if distance == 0:
        return 0.0
    scale = max(first[0], least)
    difference = distance / scale if scale else math.inf
    return difference if math.isfinite(difference) else math.inf
