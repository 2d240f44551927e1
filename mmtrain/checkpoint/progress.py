"""Position of a run, and the record of a checkpoint that holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

RECORD = "meta.json"  # written last: a checkpoint folder without it was cut short


@dataclass(frozen=True)
class Progress:
    """Position of a run: what it has done, and where it stands in its phases.

    Attributes:
        step: optimizer steps done.
        tokens: tokens consumed.
        phase: number of the phase at work, from 0.
        row: rows of that phase's stream consumed.
        phase_tokens: tokens consumed in that phase.
    """

    step: int = 0
    tokens: int = 0
    phase: int = 0
    row: int = 0
    phase_tokens: int = 0


def read_meta(path: Path) -> dict[str, Any]:
    """Return the record of the checkpoint at `path`: progress, RoPE base (old ones lack it) and configuration.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    return json.loads((path / RECORD).read_text(encoding="utf-8"))


def read_progress(path: Path) -> Progress:
    """Return how far the run was when a checkpoint was saved; old records lack the position within the phase."""
    meta = read_meta(path)
    return Progress(**{field.name: meta[field.name] for field in fields(Progress) if field.name in meta})
