"""Figures of an evaluation out of the records of its samples: by task and length, by depth, by position, by group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mmtrain.evals.cell_score import CellScore
from mmtrain.evals.files.chrf import chrf
from mmtrain.evals.files.mtob import DIRECTIONS
from mmtrain.evals.offline.request import IMAGES, PERPLEXITY, QUESTION_TASKS
from mmtrain.evals.perplexity import loss_by_position
from mmtrain.evals.ruler.registry import GROUPS
from mmtrain.evals.sample import Cell

Record = dict[str, Any]


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Return all figures of an evaluation.

    ``scores``: of made tasks a row for each task and length, with ``ruler`` the mean over RULER's tasks; ``cells``: the
    same by depth, as `needle_cells` of a run's metrics has it; ``perplexity``: loss by position, for each length;
    ``files``: of each task that reads a file.
    """
    kept = [record for record in records if not record.get("left_out")]
    made = [record for record in kept if record["length"] is not None and record["task"] != PERPLEXITY]
    return {
        "scores": _scores(made),
        "cells": [_cell(group) for group in _grouped(made, "task", "length", "depth") if group[0]["depth"] is not None],
        "perplexity": [_perplexity(group) for group in
                       _grouped([record for record in kept if record["task"] == PERPLEXITY], "length")],
        "files": {group[0]["task"]: _file(group, records) for group in
                  _grouped([record for record in kept if record["length"] is None], "task")},
    }  # fmt: skip


def _scores(made: Sequence[Record]) -> list[Record]:
    rows = [{"task": group[0]["task"], "length": group[0]["length"], "score": _mean(group, "score"),
             "samples": len(group)} for group in _grouped(made, "task", "length")]  # fmt: skip
    of_ruler = [row for row in rows if row["task"] in (*GROUPS["ruler"], *QUESTION_TASKS)]
    if len({row["task"] for row in of_ruler}) > 1:
        rows += [{"task": "ruler", "length": group[0]["length"], "score": _mean(group, "score"),
                  "samples": sum(row["samples"] for row in group), "of": len(group)}
                 for group in _grouped(of_ruler, "length")]  # fmt: skip
    return rows


def _cell(group: Sequence[Record]) -> Record:
    first, repeats = group[0], max(record.get("repeats", 1.0) for record in group)
    if "labelled" in first:  # a kind of training's: the same figures
        figures = ([record[name] for record in group] for name in ("labelled", "correct", "nats"))
        cell = Cell(first["task"], first["length"], first["depth"])
        return CellScore.of_samples(cell, *figures).record(len(group), repeats)
    return {"kind": first["task"], "length": first["length"], "depth": first["depth"], "samples": len(group),
            "passed": _mean(group, "score"), "repeats": repeats}  # fmt: skip


def _perplexity(group: Sequence[Record]) -> Record:
    length = group[0]["length"]
    return {"length": length, "rows": len(group), "loss": _mean(group, "loss"),
            "whole_documents": sum(record["one_document"] for record in group),
            "buckets": loss_by_position(length, [record["bucket_nats"] for record in group])}  # fmt: skip


def _file(group: Sequence[Record], records: Sequence[Record]) -> Record:
    task = group[0]["task"]
    found: Record = {"samples": len(group), "left_out": sum(bool(record.get("left_out")) for record in records
                                                            if record["task"] == task)}  # fmt: skip
    if task == IMAGES:
        kinds = _grouped(group, "kind")
        return {**found, **_images(group), "kinds": {part[0]["kind"]: _images(part) for part in kinds}}
    if task in DIRECTIONS:
        texts, references = [record["answer"] for record in group], [record["expected"][0] for record in group]
        return {**found, "chrf": chrf(texts, references)}
    names = sorted({name for record in group for name in record["groups"]})
    parts = {name: [record for record in group if name in record["groups"]] for name in names}
    return {**found, "chance": _mean(group, "chance"), **_choices(group),
            "groups": {name: _choices(part) for name, part in parts.items()}}  # fmt: skip


def _images(group: Sequence[Record]) -> Record:
    """Accuracy of questions on images; ANLS of those that were answered in words, chance of those with choices."""
    made: Record = {"questions": len(group), "accuracy": _mean(group, "score")}
    if free := [record for record in group if "anls" in record]:
        made |= {"free": len(free), "exact": 100 * _mean(free, "exact"), "anls": 100 * _mean(free, "anls")}
    if chosen := [record for record in group if "chance" in record]:
        made |= {"with_choices": len(chosen), "chosen": _mean(chosen, "score"), "chance": _mean(chosen, "chance")}
    return made


def _choices(group: Sequence[Record]) -> Record:
    return {"questions": len(group), "acc": 100 * _mean(group, "acc"), "acc_norm": 100 * _mean(group, "acc_norm"),
            "log_acc_norm2": _mean(group, "log_acc_norm2")}  # fmt: skip


def _mean(group: Iterable[Record], name: str) -> float:
    values = [float(record[name]) for record in group]
    return sum(values) / len(values)


def _grouped(records: Sequence[Record], *names: str) -> list[list[Record]]:
    """Records that agree in some fields, together, in the order in which they first come."""
    of: Callable[[Record], tuple[Any, ...]] = lambda record: tuple(record[name] for name in names)  # noqa: E731
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(of(record), []).append(record)
    return list(groups.values())
