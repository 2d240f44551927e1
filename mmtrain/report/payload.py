"""All that a page shows, as plain data: one mapping for each run, one for each sweep."""

from __future__ import annotations

from typing import Any

from mmtrain.report.curves import column, curves, place_of, step_places
from mmtrain.report.encode import packed
from mmtrain.report.experts import expert_loads, rank_load
from mmtrain.report.read_run import Record, RunData, number, option
from mmtrain.report.tables import about, checkpoints, last_known, launches, ledger, options, phases
from mmtrain.report.troubles import troubles

NEEDLE_EVALUATIONS = 60
"""Heat maps of needles that a page holds; those between are left out."""
MOST_MARKS = 400
MOST_ROWS = 500
LOG_SHOWN = 200


def run_payload(run: RunData) -> dict[str, Any]:
    """Return what a page shows of a run; arrays are packed (`encode.packed`)."""
    places = step_places(run.steps)
    begun, left_out, saved = launches(run), ledger(run), checkpoints(run)
    return {
        "name": run.name,
        "path": str(run.path),
        "summary": summary(run, saved),
        "troubles": troubles(run, begun, left_out, saved),
        "curves": curves(run),
        "marks": _marks(run, places, begun),
        "points": _points(run, places),
        "validations": _validations(run, places),
        "phases": phases(run),
        "layouts": [_chosen(record, ("step", "layout", "layout_changed", "layout_s")) for record in run.layouts],
        "experts": expert_loads(run, places),
        "needles": _needles(run),
        "evaluations": run.evaluations,
        "checkpoints": saved[-MOST_ROWS:],
        "launches": begun[-MOST_ROWS:],
        "ledger": left_out[-MOST_ROWS:],
        "ledger_rows": len(left_out),
        "about": about(run),
        "options": options(run),
        "log": run.log[-LOG_SHOWN:],
    }


def summary(run: RunData, saved: list[Record]) -> dict[str, Any]:
    """Return the figures at the top of a page.

    ``loss`` is that of the last step that has one; ``val_loss`` and ``val_bits_per_byte`` of the last validation;
    speeds are medians over all steps; memory is the most of any step.
    """
    steps, told = run.steps, about(run)
    medians = {name: _median(run, name) for name in ("tokens_per_s", "mfu", "step_s", "drop_rate")}
    most = column(steps, "memory_gib")
    whole = [row for row in saved if row["damage"] is None and row["aside"] is None]
    return {
        "model": option(run.config, "model", "name"),
        "stage": option(run.config, "stage", "name"),
        "parameters": told.get("parameters"),
        "activated": told.get("activated"),
        "step": steps[-1]["step"],
        "last_step": told.get("last_step"),
        "tokens": steps[-1]["tokens"],
        "loss": last_known(steps, "loss"),
        "first_loss": next((record["loss"] for record in steps if number(record.get("loss"))), None),
        "val_loss": last_known(run.validations, "val_loss"),
        "val_bits_per_byte": last_known(run.validations, "val_bits_per_byte"),
        "val_step": run.validations[-1]["step"] if run.validations else None,
        "needles": last_known(run.needles, "needles"),
        **medians,
        "memory_gib": max((value for value in most if value == value), default=None),
        "memory_predicted_gib": last_known(steps, "memory_predicted_gib"),
        "hours": float(step_places(steps)["hours"][-1]),
        "training_hours": float(sum(record["step_s"] for record in steps if number(record.get("step_s")))) / 3600,
        "began": steps[0].get("time"),
        "ended": steps[-1].get("time"),
        "checkpoint": whole[-1]["step"] if whole else None,
        "skipped": sum(bool(record.get("skipped")) for record in steps),
    }


def _median(run: RunData, name: str) -> float | None:
    known = sorted(record[name] for record in run.steps if number(record.get(name)))
    return known[len(known) // 2] if known else None


def _marks(run: RunData, places: dict[str, Any], begun: list[Record]) -> list[dict[str, Any]]:
    """Places where a run began anew, left a step out, went back or changed its phase or layout."""
    found = [("skipped", record, "skipped") for record in run.steps if record.get("skipped")]
    found += [("restart", record, "launch") for record in begun[1:] if type(record.get("step")) is int]
    found += [("rollback", record, f"back from step {record.get('after_step')}") for record in run.ledger
              if "left_out" in record and type(record.get("step")) is int]  # fmt: skip
    found += [("layout", record, str(record.get("layout_changed"))) for record in run.layouts]
    chosen = found[:: max(1, -(-len(found) // MOST_MARKS))]
    return [{"kind": kind, "at": list(place_of(record, places)), "text": text} for kind, record, text in chosen]


def _points(run: RunData, places: dict[str, Any]) -> dict[str, Any]:
    """Figures that are measured now and then: each packed with its places, by name."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for record in run.validations:
        for name in ("val_loss", "val_bits_per_byte"):
            if number(record.get(name)):
                rows.setdefault(name, []).append((*place_of(record, places), record[name]))
    for record in run.needles:
        for name, value in record.items():
            if name.startswith("needles") and name.count("/") < 2 and name != "needles_s" and number(value):
                rows.setdefault(name, []).append((*place_of(record, places), value))
    for record in run.paces:
        for name in ("pace_product_s", "pace_rows_s"):
            values = record.get(name)
            if isinstance(values, list) and len(values) == 4 and all(map(number, values)):
                for part, value in zip(("least", "median", "most"), values, strict=False):
                    rows.setdefault(f"{name}/{part}", []).append((*place_of(record, places), value))
    for record in run.steps:
        entropy = record.get("router_entropy")
        if isinstance(entropy, list) and entropy and all(map(number, entropy)):
            mean = sum(entropy) / len(entropy)
            rows.setdefault("router_entropy", []).append((*place_of(record, places), mean))
    if balance := rank_load(run, places):
        rows["rank_load"] = balance
    return {name: _packed_rows(found) for name, found in rows.items()}


def _packed_rows(rows: list[tuple[float, ...]]) -> dict[str, Any]:
    thin = rows[:: max(1, -(-len(rows) // 2000))]
    names = (("step", "f8"), ("tokens", "f8"), ("hours", "f8"), ("value", "f4"))
    return {name: packed([row[i] for row in thin], kind) for i, (name, kind) in enumerate(names)}


def _validations(run: RunData, places: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**_chosen(record, ("step", "val_loss", "val_bits_per_byte")), "tokens": place_of(record, places)[1]}
            for record in run.validations[-MOST_ROWS:]]  # fmt: skip


def _needles(run: RunData) -> list[dict[str, Any]]:
    """Cells of evaluations, the last one always among them."""
    every = max(1, -(-len(run.needles) // NEEDLE_EVALUATIONS))
    kept = run.needles[::-1][::every][::-1]
    return [{**_chosen(record, ("step", "needles", "phase")), "cells": cells} for record in kept
            if (cells := _cells(record.get("needle_cells")))]  # fmt: skip


def _cells(cells: Any) -> list[list[Any]]:
    """Kind, length, depth, percentage of samples that passed, and repeats of the held-out text, of each cell."""
    wanted = ("length", "depth", "passed")
    return [[str(cell.get("kind")), *(cell[name] for name in wanted), cell.get("repeats", 1)]
            for cell in cells if isinstance(cell, dict) and all(number(cell.get(name)) for name in wanted)
            ] if isinstance(cells, list) else []  # fmt: skip


def _chosen(record: Record, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: record.get(name) for name in names}
