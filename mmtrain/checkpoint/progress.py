"""How far a run has come: what a checkpoint records beside its weights, and what a launch goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "meta.json"
FORMAT = 3
"""Version of what checkpoints consist of, `format` in the record. Since 2 they have a manifest of checksums; since 3
tensors lie raw in safetensors files under an index in JSON, where torch's distributed checkpoint wrote pickles.
"""

_LARGEST = 64 << 20  # bytes of a record: the options of a run take some thousands
FROZEN = "frozen"
"""Entry of the record: patterns of the parameters that were frozen, which have no optimizer state in the checkpoint."""


@dataclass(frozen=True)
class Progress:
    """Position of a run: the phase at work, the rows of its stream that are used up, and tokens.

    Tokens are those of text: padding does not count. The position names rows and tokens, not steps, so that it means
    the same under another batch size.

    Attributes:
        step: optimizer steps done.
        tokens: tokens consumed, in all phases.
        phase: index of the phase of the last step.
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
        ValueError: it is not JSON, or larger than a record can be.
    """
    file = path / RECORD
    if (size := file.stat().st_size) > _LARGEST:
        raise ValueError(f"{size:,} bytes")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested beyond reason") from error


def read_progress(path: Path) -> Progress | None:
    """Return how far the run was when a checkpoint was saved; None where the record is older than phase and row."""
    return progress_of(read_meta(path))


def progress_of(meta: Mapping[str, Any]) -> Progress | None:
    """Return the progress in a checkpoint's record; None where the record is older than phase and row."""
    if "row" not in meta:
        return None
    return Progress(meta["step"], meta["tokens"], meta["phase"], meta["row"], meta["phase_tokens"])
