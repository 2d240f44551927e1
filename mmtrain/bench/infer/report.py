"""The figures of the inference bench as a picture and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtrain.log.figure import new_figure, save_figure

Row = Mapping[str, Any]
COLUMNS = {
    "step_ms": ("ms a step", "{:.2f}"), "device_ms": ("ms on the device", "{:.2f}"), "seconds": ("s", "{:.2f}"),
    "tokens_s": ("tokens/s", "{:,.0f}"), "of_floor": ("of the bytes' floor", "{:.1%}"),
    "of_floor_device": ("device alone", "{:.1%}"), "of_predicted": ("x predicted", "{:.3f}"),
    "mfu": ("MFU", "{:.1%}"), "of_forward": ("of the forward pass", "{:.1%}"),
    "weights_of_plan": ("weights / plan", "{:.4f}"), "step_of_plan": ("a step's memory / plan", "{:.3f}"),
}  # fmt: skip
"""Columns of the table, by the name of the figure."""


def with_predictions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows in which single documents' decode steps are set against what bytes predict from the shortest one's.

    Predicted is its time, and the time of the further bytes at the rate of a copy.
    """
    curve = decode_curve(rows)
    found = []
    for row in rows:
        row = dict(row)
        if curve and any(row["case"] == one["case"] for one in curve[1:]):
            row["predicted_ms"] = curve[0]["step_ms"] + row["floor_ms"] - curve[0]["floor_ms"]
            row["of_predicted"] = row["step_ms"] / row["predicted_ms"]
        found.append(row)
    return found


def decode_curve(rows: Sequence[Row]) -> list[Row]:
    """Decode steps of a single document of the first case's model, in bf16 with graphs, by its length."""
    found = [row for row in rows if row.get("documents") == 1 and "step_ms" in row and row.get("precision") == "bf16"
             and row.get("graphs") is not False]  # fmt: skip
    found = [row for row in found if row["model"] == found[0]["model"]]
    return sorted(found, key=lambda row: row["context"])


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a case, then the cases that are no rate (mixed batches, shares)."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = ["| case | " + " | ".join(COLUMNS[name][0] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        if any(name in row for name in names):
            cells = [COLUMNS[name][1].format(row[name]) if name in row else "" for name in names]
            lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_shares_lines(rows), *_other_lines(rows)])


def _shares_lines(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "points" in row:
            lines += ["", f"{row['case']}: the mixer's (attention's alone) share of mixer and feed-forward:", "",
                      "| tokens | softmax layers | lightning layers | softmax in 7:1 | lightning in 7:1 |",
                      "|---|---|---|---|---|"]  # fmt: skip
            lines += [_point_line(point) for point in row["points"]]
    return lines


def _point_line(point: Row) -> str:
    kinds = [f"{point[kind]['share']:.1%} ({point[kind]['core_share']:.1%})" for kind in ("softmax", "lightning")]
    whole = [f"{point['hybrid'][f'{kind}_core_share']:.1%}" for kind in ("softmax", "lightning")]
    return f"| {point['tokens']:,} | " + " | ".join([*kinds, *whole]) + " |"


def _other_lines(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "core_ms" in row:
            lines += ["", _mixed_line(row)]
        for problem in ("error", "skipped"):
            if problem in row:
                lines += ["", f"{row['case']}: {problem}: {row[problem]}"]
    return lines


def _mixed_line(row: Row) -> str:
    kernels = f" (kernels alone {row['core_kernels_of_padded']:.1%})" if "core_kernels_of_padded" in row else ""
    return (
        f"{row['case']}: lightning attention {row['core_ms']:.4f} ms a layer, {row['core_of_padded']:.1%}{kernels} "
        f"of the padded way; a step {row['mixed_step_ms']:.2f} ms, without prompts {row['decode_step_ms']:.2f} ms; "
        f"rows of each projection {row['projection_rows']}"
    )


def draw(rows: Sequence[Row], out: Path) -> Path | None:
    """Draw time a token over context, and attention's share; None where neither was measured."""
    curve, points = decode_curve(rows), next((row["points"] for row in rows if "points" in row), [])
    if not curve and not points:
        return None
    panels = bool(curve) + bool(points)
    figure = new_figure(5.5 * panels, 4.2)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    left, right = axes[0], axes[-1]
    contexts = [row["context"] for row in curve]
    if curve:
        left.plot(contexts, [row["step_ms"] for row in curve], "o-", label="measured")
        left.plot(contexts, [row["floor_ms"] for row in curve], ":", label="bytes at a copy's rate")
        left.plot(contexts, [row.get("predicted_ms", row["step_ms"]) for row in curve], "--",
                  label="first point and further bytes")  # fmt: skip
        left.set(xscale="log", xlabel="tokens of context", ylabel="ms a token", title=f"Decode, {curve[0]['model']}")
        left.set_ylim(bottom=0)
        left.legend()
    if points:
        lengths = [point["tokens"] for point in points]
        for kind in ("softmax", "lightning"):
            right.plot(lengths, [100 * point[kind]["share"] for point in points], "o-", label=f"{kind} layers")
        right.set(xscale="log", ylim=(0, 100), xlabel="tokens of the prompt", ylabel="% of mixer and feed-forward",
                  title="Prefill: time in attention")  # fmt: skip
        right.legend()
    return save_figure(figure, out)
