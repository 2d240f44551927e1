"""Figures of an evaluation as text for a terminal and a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmtrain.evals.offline.request import QUESTION_TASKS
from mmtrain.evals.ruler.registry import GROUPS


def tables(summary: dict[str, Any]) -> str:
    """Return the figures of `summary.summarise` as tables with a blank line between them."""
    parts = [
        _scores(summary["scores"]),
        _nats(summary["cells"]),
        *map(_perplexity, summary["perplexity"]),
        *_files(summary["files"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(summary: dict[str, Any]) -> str:
    """Return the most telling figures in one line."""
    told = []
    rows = summary["scores"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if "ruler" in tasks:  # the mean stands for its parts
        tasks = ["ruler", *(task for task in tasks if task not in (*GROUPS["ruler"], *QUESTION_TASKS, "ruler"))]
    for task in tasks:
        own = (row for row in rows if row["task"] == task)
        told.append(f"{task} " + ", ".join(f"{row['score']:.1f} at {row['length']:,}" for row in own))
    for one in summary["perplexity"]:
        last = one["buckets"][-1]
        told.append(
            f"loss {one['loss']:.4f} over {one['length']:,} tokens, {last['loss']:.4f} from {last['first']:,} on"
        )
    for task, one in summary["files"].items():
        percent = one["accuracy"] if "kinds" in one else one.get("acc")
        told.append(f"{task} chrF {one['chrf']:.2f}" if "chrf" in one else f"{task} {percent:.1f}%")
    return "; ".join(told) or "nothing was evaluated"


def _scores(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lengths = sorted({row["length"] for row in rows})
    tasks = dict.fromkeys(row["task"] for row in rows)
    found = {(row["task"], row["length"]): row["score"] for row in rows}
    head = ["% found", *(f"{length:,}" for length in lengths)]
    body = [[task, *(f"{found[task, length]:.1f}" if (task, length) in found else "" for length in lengths)]
            for task in tasks]  # fmt: skip
    return _table([head, *body])


def _nats(cells: Sequence[dict[str, Any]]) -> str:
    """Of training's kinds, which move long before answers are right."""
    found: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        if "nats" in cell:
            found.setdefault(cell["kind"], {}).setdefault(cell["length"], []).append(cell["nats"])
    if not found:
        return ""
    lengths = sorted({length for of_kind in found.values() for length in of_kind})
    head = ["nats an answer token", *(f"{length:,}" for length in lengths)]
    body = [[kind, *(f"{sum(of_kind[length]) / len(of_kind[length]):.3f}" for length in lengths)]
            for kind, of_kind in found.items()]  # fmt: skip
    return _table([head, *body])


def _perplexity(one: dict[str, Any]) -> str:
    whole = f"{one['whole_documents']} of {one['rows']} rows are one document"
    head = [f"positions of {one['length']:,}", "loss, nats", "tokens"]
    body = [
        [f"{row['first']:,} - {row['last']:,}", f"{row['loss']:.4f}", f"{row['tokens']:,}"] for row in one["buckets"]
    ]
    return _table([head, *body, ["all", f"{one['loss']:.4f}", whole]])


def _files(files: dict[str, Any]) -> list[str]:
    found = []
    for task, one in files.items():
        left_out = f", {one['left_out']} longer ones left out" if one["left_out"] else ""
        if "chrf" in one:
            found.append(f"{task}: chrF {one['chrf']:.2f} over {one['samples']} sentences{left_out}")
            continue
        if "kinds" in one:
            found.append(_images(task, one) + left_out)
            continue
        head = [task, "questions", "acc", "acc_norm", "log acc_norm^2"]
        rows = [["all", one], *([name, part] for name, part in one["groups"].items())]
        body = [[name, f"{part['questions']:,}", f"{part['acc']:.1f}", f"{part['acc_norm']:.1f}",
                 f"{part['log_acc_norm2']:.4f}"] for name, part in rows]  # fmt: skip
        found.append(_table([head, *body]) + f"\nguessing gets {one['chance']:.1f}% right{left_out}")
    return found


def _images(task: str, one: dict[str, Any]) -> str:
    """Accuracy by kind; a figure that no question of a kind has is left empty."""
    names = [name for name in ("exact", "anls", "chosen", "chance") if name in one]
    rows = [["all", one], *([kind, part] for kind, part in one["kinds"].items())]
    body = [[kind, f"{part['questions']:,}", f"{part['accuracy']:.1f}",
             *(f"{part[name]:.1f}" if name in part else "" for name in names)] for kind, part in rows]  # fmt: skip
    return _table([[task, "questions", "accuracy", *names], *body])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of texts, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
