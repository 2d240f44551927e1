"""The result as a Markdown table and as files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = ("what", "shape", "ours ms", "peer", "peer ms", "peer / ours", "floor ms", "of floor", "goal", "reached", "more")
NONE = "–"


def file_stem(date: str, gpu: str, quick: bool = False, partial: bool = False) -> str:
    """`2026-01-31-h100`; runs that are not the whole table say so and do not write over it."""
    return "-".join([date, gpu, *(["quick"] if quick else []), *(["partial"] if partial else [])])


def number(value: Any) -> str:
    """Four significant digits; errors' names as they are; a dash for None."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.2e}"


def more(extra: Mapping[str, Any]) -> str:
    """`name value` pairs, nested ones in brackets."""
    parts = []
    for key, value in extra.items():
        text = f"({more(value)})" if isinstance(value, Mapping) else number(value)
        parts.append(f"{key.replace('_', ' ')} {text}")
    return ", ".join(parts)


def row_line(row: Mapping[str, Any]) -> str:
    """One line of the table; texts cannot break it."""
    cells = [row["name"], row["shape"], number(row["ours_ms"]), row["peer"] or NONE, number(row["peer_ms"])]
    cells += [number(row[key]) for key in ("ratio_to_peer", "floor_ms", "of_floor")]
    cells += [row["goal"] or NONE, number(row["reached"]), more(row["extra"])]
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def goal_line(result: Mapping[str, Any]) -> str:
    """How many goals were reached."""
    goals = [row["reached"] for row in result["rows"] if row["goal"]]
    counts = (goals.count(True), goals.count(False), goals.count(None))
    return "{} goals: {} reached, {} not reached, {} not measured.".format(len(goals), *counts)


def header(result: Mapping[str, Any]) -> list[str]:
    """Machine, software, rates, and what is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        f"# Kernels on one {result['device']}, {result['date']}" + (" (quick run)" if result["quick"] else ""),
        "",
        f"{versions}. Copy {number(result['copy_gbps'])} GB/s (read and written), bf16 product of 8192 cubed "
        f"{number(result['matmul_tflops'])} TFLOP/s. The run took {result['seconds']:.0f} s.",
        "",
        "Times are medians, inputs bf16. Each call is captured in a CUDA graph and replayed with a cold L2 cache, so "
        "that the GPU's time counts and not the host's; short rows are timed as a program launches them. A floor "
        "is the bytes that must move at the copy's "
        "bandwidth; 'of floor' is floor over ours. An error's name stands where a call raised it.",
    ]
    if result["fla_missing"]:
        lines += ["", f"flash-linear-attention could not be imported ({result['fla_missing']}): its cells are empty."]
    if result.get("note"):
        lines += ["", result["note"]]
    return [*lines, "", goal_line(result)]


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = header(result)
    for group, rows in itertools.groupby(result["rows"], key=lambda row: row["group"]):
        lines += ["", f"## {group}", "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        lines += [row_line(row) for row in rows]
    if result["errors"]:
        lines += ["", "## errors raised", "", *(f"- {text}" for text in result["errors"])]
    return "\n".join(lines) + "\n"


def write(result: Mapping[str, Any], path: Path) -> None:
    """``path`` with `.json` and `.md`; called after each group, so that a run cut short leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    path.with_name(path.name + ".md").write_text(markdown(result))
