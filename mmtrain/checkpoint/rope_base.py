"""The RoPE base that a checkpoint was saved with: the phases of a run may have different ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError

_METRICS = "metrics.jsonl"  # of the run folder: a checkpoint lies at RUN/checkpoints/step-N


def rope_base_of(checkpoint: Path, meta: dict[str, Any]) -> float:
    """Return the RoPE base of the step that a checkpoint was saved after.

    Its record names the base. A record without it (the checkpoint was written before there was such an entry) gives the
    base where all phases of the run agree on one; else the run's metrics, beside the checkpoint, know it by the step.

    Args:
        checkpoint: folder of the checkpoint.
        meta: the record that :func:`~mmtrain.checkpoint.progress.read_meta` returns for it.

    Raises:
        ConfigError: none of the three says it.
    """
    if "rope_base" in meta:
        return float(meta["rope_base"])
    bases = {float(phase["rope_base"]) for phase in meta["config"]["stage"]["phases"]}
    if len(bases) == 1:
        return bases.pop()
    found = _recorded_in_metrics(checkpoint.resolve().parents[1] / _METRICS, meta["step"])
    if found is None:
        ways = ", ".join(f"{base:g}" for base in sorted(bases))
        raise ConfigError("checkpoint", checkpoint, f"does not record its RoPE base; its run's phases have {ways}",
                          "give the one of its phase with --rope-base")  # fmt: skip
    return found


def _recorded_in_metrics(path: Path, step: int) -> float | None:
    """Return the base in the record of a training step; None where the file or the record is missing."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # a line that a crash cut short
                continue
            if isinstance(record, dict) and record.get("step") == step and "rope_base" in record:
                return float(record["rope_base"])
    return None
