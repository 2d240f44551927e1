"""Results of offline evaluations that lie in a run's folder, `evals/*.json`, as a page shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER, FORMAT = "evals", "mmtrain.eval/"
MOST = 40
"""Evaluations that a page holds, the last ones."""


def read_evaluations(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the results of a run's evaluations, by step and time.

    Returns:
        For each: ``name``, ``step``, ``began``; ``rows`` of task, length, score and samples; ``cells`` of kind, length,
        depth, score and repeats of the held-out text; ``perplexity`` with ``length``, ``loss``, ``rows``,
        ``whole_documents`` and ``buckets`` of first and last position and loss; ``files`` of name, questions, acc,
        acc_norm, log acc_norm^2, chrF, and what was left out. And the names of files that are none.
    """
    found, damaged = [], []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            if not str(made["format"]).startswith(FORMAT):
                continue  # another program's
            found.append(_shown(path.stem, made))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            damaged.append(f"{FOLDER}/{path.name}")
    found.sort(key=lambda one: (one["step"] or 0, one["began"], one["name"]))
    return found[-MOST:], damaged


def _shown(name: str, made: dict[str, Any]) -> dict[str, Any]:
    step = made["checkpoint"]["step"]
    return {
        "name": name,
        "step": None if step is None else int(step),
        "began": str(made["began"]),
        "rows": [
            [str(row["task"]), int(row["length"]), float(row["score"]), int(row["samples"])] for row in made["scores"]
        ],
        "cells": [
            [str(cell["kind"]), int(cell["length"]), *(float(cell[key]) for key in ("depth", "passed", "repeats"))]
            for cell in made["cells"]
        ],
        "perplexity": [_losses(one) for one in made["perplexity"]],
        "files": [row for task, one in made["files"].items() for row in _file(str(task), one)],
    }


def _losses(one: dict[str, Any]) -> dict[str, Any]:
    counts = {key: int(one[key]) for key in ("length", "rows", "whole_documents")}
    buckets = [[int(row["first"]), int(row["last"]), float(row["loss"])] for row in one["buckets"]]
    return {**counts, "loss": float(one["loss"]), "buckets": buckets}


def _file(task: str, one: dict[str, Any]) -> list[list[Any]]:
    """Rows of a task that reads a file: of all its questions, and of each group."""
    left_out = int(one["left_out"])
    if "chrf" in one:
        return [[task, int(one["samples"]), None, None, None, float(one["chrf"]), left_out]]
    parts = [(task, one, left_out), *((f"{task}, {name}", part, 0) for name, part in one["groups"].items())]
    keys = ("acc", "acc_norm", "log_acc_norm2")
    return [[name, int(part["questions"]), *(float(part[key]) for key in keys), None, out] for name, part, out in parts]
