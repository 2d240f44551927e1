"""Position that a checkpoint was saved at, whichever version of mmtrain wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.progress import Progress, progress_of, read_meta
from mmtrain.config import PhaseConfig, StageConfig
from mmtrain.config.schema import build
from mmtrain.train.curriculum import RunPlan, scaled_phases


def checkpoint_position(checkpoint: Path) -> Progress:
    """Return the position of a run when a checkpoint was saved; see :func:`recorded_position`."""
    return recorded_position(read_meta(checkpoint))


def recorded_position(meta: Mapping[str, Any]) -> Progress:
    """Return the position in a checkpoint's record.

    Older records hold steps and tokens alone. Their rows had no padding that counted, and the stage that they record
    says the rest.
    """
    if (recorded := progress_of(meta)) is not None:
        return recorded
    return RunPlan(recorded_phases(meta), dp_size=1, micro_batch_rows=1).position(meta["step"], meta["tokens"])


def recorded_phases(meta: Mapping[str, Any]) -> list[PhaseConfig]:
    """Return the phases of the stage in a checkpoint's record, with their scales applied."""
    return scaled_phases(build(StageConfig, meta["config"]["stage"], "stage"))
