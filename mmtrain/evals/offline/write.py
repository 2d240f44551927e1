"""Files of an evaluation: `NAME.json` with all of it, `NAME.txt` with its tables, `NAME.png` with maps by depth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.durable import write_text
from mmtrain.evals.heat_map import draw_heat_maps
from mmtrain.evals.offline.request import EvalRequest
from mmtrain.evals.offline.table import tables

FORMAT = "mmtrain.eval/1"
SAMPLES = ".samples.jsonl"
_LEFT_TO_LOG = ("answer", "expected", "bucket_nats", "key")


def name_of(request: EvalRequest, checkpoint: dict[str, Any], text: dict[str, Any]) -> str:
    """Return the name of an evaluation's files: of the checkpoint, and a hash of all that its figures depend on.

    The same request of the same checkpoint has the same name, so that one that was stopped goes on.
    """
    facts = {
        **request.record(),
        **text,
        **{name: checkpoint.get(name) for name in ("sha256", "rope_base", "tokenizer_vocab", "precision")},
    }
    told = json.dumps(facts, sort_keys=True).encode()
    return f"eval-{Path(checkpoint['path']).name}-{hashlib.sha256(told).hexdigest()[:8]}"


def write_results(folder: Path, name: str, result: dict[str, Any]) -> list[Path]:
    """Write the files of an evaluation, and return their paths.

    Args:
        folder: that is there.
        name: as :func:`name_of` returns it.
        result: with `checkpoint`, `request`, the figures of `summary.summarise`, and `samples`, whole records.

    Raises:
        OSError: they cannot be written.
    """
    samples = [{key: value for key, value in record.items() if key not in _LEFT_TO_LOG} for record in result["samples"]]
    written = [folder / f"{name}.json", folder / f"{name}.txt"]
    made = {"format": FORMAT, **result, "samples": samples}
    write_text(written[0], json.dumps(made, indent=1, allow_nan=False) + "\n")
    write_text(written[1], tables(result))
    if result["cells"]:
        step = result["checkpoint"]["step"]
        title = f"{Path(result['checkpoint']['path']).name}" + ("" if step is None else f", step {step:,}")
        written.append(draw_heat_maps({"needle_cells": result["cells"]}, folder / f"{name}.png", title))
    return written
