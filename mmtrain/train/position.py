"""Position that a checkpoint was saved at, whichever version of mmtrain wrote it."""

from __future__ import annotations

from pathlib import Path

from mmtrain.checkpoint.progress import Progress, read_meta, read_progress
from mmtrain.config import StageConfig
from mmtrain.config.schema import build
from mmtrain.train.curriculum import RunPlan, scaled_phases


def checkpoint_position(checkpoint: Path) -> Progress:
    """Return the position of a run when a checkpoint was saved.

    Older records hold steps and tokens alone. Their rows had no padding that counted, and the stage that they record
    says the rest.
    """
    if (recorded := read_progress(checkpoint)) is not None:
        return recorded
    meta = read_meta(checkpoint)
    phases = scaled_phases(build(StageConfig, meta["config"]["stage"], "stage"))
    return RunPlan(phases, dp_size=1, micro_batch_rows=1).position(meta["step"], meta["tokens"])
