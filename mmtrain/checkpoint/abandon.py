"""Setting aside of a run's history that a launch does not go on with: it is moved, never deleted."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from mmtrain.checkpoint.durable import sync_folder
from mmtrain.checkpoint.listing import all_checkpoints, step_of

FOLDER = "abandoned"
METRICS = "metrics.jsonl"
_WANDB_ID = Path("wandb", "mmtrain_run_id")  # wandb takes no step twice: the branch keeps its page, a new one begins


def set_aside(run: Path, after: int, always: bool = False) -> str | None:
    """Move what a run folder holds of the steps past `after` to ``abandoned/DATE-after-step-N``.

    Checkpoints go newest first and the metrics last, so that a kill in between leaves the branch shorter, and whole.
    The records of those steps are copied; the writer of the metrics cuts them from the file.

    Args:
        run: the run's folder, whose lock this process holds.
        after: the step that the run goes on from; what it did before stays. -1 sets all aside.
        always: the metrics are worth keeping though no checkpoint goes with them.

    Returns:
        A line that says what was set aside; None where there was nothing.

    Raises:
        OSError: it cannot be moved.
    """
    checkpoints = [path for path in reversed(all_checkpoints(run / "checkpoints")) if step_of(path) > after]
    records = _lines_after(run / METRICS, after) if checkpoints or always else []
    if not checkpoints and not records:
        return None
    target = _fresh(run / FOLDER / f"{datetime.now(UTC):%Y-%m-%d}-after-step-{max(after, 0)}")
    (target / "checkpoints").mkdir(parents=True)
    for path in checkpoints:
        os.replace(path, target / "checkpoints" / path.name)
    sync_folder(run / "checkpoints")
    (target / METRICS).write_bytes(b"".join(records))
    if (run / _WANDB_ID).exists():
        (target / _WANDB_ID).parent.mkdir()
        os.replace(run / _WANDB_ID, target / _WANDB_ID)
    if after < 0 and (run / METRICS).exists():
        (run / METRICS).unlink()
    if (run / "config.json").exists():
        shutil.copy(run / "config.json", target / "config.json")
    sync_folder(target)
    named = ", ".join(path.name for path in reversed(checkpoints)) or "no checkpoint"
    return f"set aside what the run did after step {max(after, 0)}, in {target}: {named}, {len(records)} records"


def _lines_after(path: Path, step: int) -> list[bytes]:
    """Return the whole lines of the metrics that record a later step."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and line.endswith(b"\n") and record.get("step", 0) > step:
            found.append(line)
    return found


def _fresh(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3 and so on that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
