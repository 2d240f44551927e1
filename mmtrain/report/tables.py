"""Phases, checkpoints, launches, skipped steps and options of a run, as rows of tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.listing import PHASE_END, VALID_LOSS, all_checkpoints, step_of
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.recorded_options import flat_options
from mmtrain.report.read_run import Record, RunData, number

BEGAN, ENDED = "began", "ended"
HEADER = ("device", "layout", "model", "numbers")
"""First words of a log's lines that tell what a launch runs on and trains."""


def phases(run: RunData) -> list[Record]:
    """Return a row for each stretch of steps of one phase: its name, steps, tokens, rows and figures."""
    parts: list[list[Record]] = []
    for record in run.steps:
        if not parts or (record.get("phase"), record.get("seq_len")) != _phase(parts[-1][-1]):
            parts.append([])
        parts[-1].append(record)
    rows, before = [], 0.0
    for part in parts:
        first, last = part[0], part[-1]
        rows.append({
            "name": _text(first.get("phase")), "seq_len": _number(first.get("seq_len")),
            "rope_base": _number(first.get("rope_base")), "first_step": first["step"], "last_step": last["step"],
            "tokens": last["tokens"] - before, "first_tokens": before, "batch": _batches(part),
            "loss": last_known(part, "loss"), "tokens_per_s": _median(part, "tokens_per_s"),
            "mfu": _median(part, "mfu"), "memory_gib": _most(part, "memory_gib"),
            "memory_predicted_gib": _most(part, "memory_predicted_gib"), "drop_rate": _median(part, "drop_rate"),
            "skipped": sum(bool(record.get("skipped")) for record in part),
        })  # fmt: skip
        before = last["tokens"]
    return rows


def checkpoints(run: RunData) -> list[Record]:
    """Return a row for each checkpoint of the run, also of what it set aside; tensors are not read."""
    places = [(run.path / "checkpoints", None)]
    places += [(path / "checkpoints", path.name) for path in sorted(run.path.glob("abandoned/*"))]
    return [_checkpoint(path, aside) for folder, aside in places for path in all_checkpoints(folder)]


def launches(run: RunData) -> list[Record]:
    """Return a row for each launch: where it began and ended, why, and on what. One without an end has ``end`` None."""
    rows: list[Record] = []
    for record in run.launches:
        if record.get("event") == BEGAN:
            rows.append({**record, "end": None, "why": None})
        elif record.get("event") == ENDED and rows:
            rows[-1] |= {"end": record.get("step"), "why": record.get("why"), "ended": record.get("time")}
    return rows


def about(run: RunData) -> dict[str, Any]:
    """Return what the last launch ran on; of a run that did not record it, what its log's header says."""
    found = launches(run)
    if found:
        return {key: value for key, value in found[-1].items() if key not in ("event", "end", "why", "ended")}
    told: dict[str, Any] = {}
    for _, text in run.log:
        word, _, rest = text.partition(" ")
        if word in HEADER:
            told[word] = rest.strip()
    return told


def ledger(run: RunData) -> list[Record]:
    """Return a row for each skipped step and each rollback, oldest first."""
    rows: list[Record] = []
    for record in run.ledger:
        if "left_out" in record:
            back = [one for one in record.get("skipped") or [] if isinstance(one, dict)]
            rows += [{**_skipped(one), "undone": True} for one in back]
            rows.append({"kind": "rollback", "step": record.get("after_step"), "to_step": record.get("step"),
                         "left_out": record["left_out"]})  # fmt: skip
        else:
            rows.append(_skipped(record))
    return rows


def options(run: RunData) -> dict[str, str]:
    """Return every option by its place, as text."""
    return {place: value if isinstance(value, str) else json.dumps(value)
            for place, value in flat_options(run.config, "").items()}  # fmt: skip


def last_known(records: Sequence[Record], name: str) -> float | None:
    """Return the last value of a figure that is a number."""
    return next((record[name] for record in reversed(records) if number(record.get(name))), None)


def _skipped(record: Record) -> Record:
    kept = {key: record.get(key) for key in ("step", "phase", "first_row", "rows", "loss", "grad_norm", "loss_limit",
                                             "grad_norm_limit")}  # fmt: skip
    return {"kind": "spike" if record.get("finite") else "not finite", **kept}


def _checkpoint(path: Path, aside: str | None) -> Record:
    files = [file for file in path.rglob("*") if file.is_file()]
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    row: Record = {"step": step_of(path), "path": str(path), "aside": aside, "files": len(files), "time": written,
                   "bytes": sum(file.stat().st_size for file in files), "damage": damage_of(path)}  # fmt: skip
    try:
        meta = read_meta(path)
    except (OSError, ValueError):
        return row
    if not isinstance(meta, dict):
        return row
    layout = meta.get("layout")
    row |= {"tokens": _number(meta.get("tokens")), "phase": _number(meta.get("phase")),
            "valid_loss": _number(meta.get(VALID_LOSS)), "phase_end": meta.get(PHASE_END) is True}  # fmt: skip
    if isinstance(layout, dict):
        row["layout"] = " ".join(f"{axis}{ways}" for axis, ways in layout.items() if ways != 1) or "one process"
    return row


def _phase(record: Record) -> tuple[Any, Any]:
    return record.get("phase"), record.get("seq_len")


def _batches(part: Sequence[Record]) -> list[int]:
    """Tokens of a step, in the order in which they came."""
    sizes = [record["rows"] * record["seq_len"] for record in part
             if number(record.get("rows")) and number(record.get("seq_len"))]  # fmt: skip
    return list(dict.fromkeys(sizes))


def _median(part: Sequence[Record], name: str) -> float | None:
    known = [record[name] for record in part if number(record.get(name))]
    return median(known) if known else None


def _most(part: Sequence[Record], name: str) -> float | None:
    return max((record[name] for record in part if number(record.get(name))), default=None)


def _number(value: Any) -> float | None:
    return value if number(value) else None


def _text(value: Any) -> str:
    return "" if value is None else str(value)
