"""What runs the measurements of context parallelism one by one, and keeps, prints and writes their figures.

A measurement that raises is a row with its error, and the next one follows: on all ranks, whichever of them failed.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.bench.timing import slowest
from mmtrain.parallel.mesh import ParallelContext

Figures = dict[str, Any]
TIMES = {"forward_ms": "forward ms", "backward_ms": "backward ms"}
REST = {"peak_gib": "peak GiB", "error": "error", "note": "note"}
COLUMNS: dict[str, dict[str, str]] = {
    "softmax": {"tokens": "tokens a GPU", "way": "way", "table": "table", **TIMES, "forward_tflops": "forward TFLOP/s",
                "backward_tflops": "backward TFLOP/s", "of_alone": "of one GPU's rates", "balance": "balance", **REST},
    "lightning": {"tokens": "tokens a GPU", "what": "what", "way": "way", "documents": "documents", **TIMES,
                  "of_alone": "of one GPU's rates", "both": "of it, both", "gather_ms": "all-gather alone ms", **REST},
    "planning": {"row": "row", "cp": "cp", "table": "table", "chunks": "chunks a rank", "plan_ms": "table ms",
                 "cut_ms": "cut ms", "tails_ms": "tails ms", "total_ms": "together ms", "longest_ms": "longest ms",
                 "balance": "balance", "worst": "95th percentile", "note": "note"},
    "moving": {"tokens": "tokens a GPU", "table": "table", "chunks": "chunks a rank", "moved": "moved", **TIMES,
               "both_ms": "together ms", **REST},
    "rates": {"tokens": "tokens a row", "documents": "documents", "products_tflops": "products TFLOP/s",
              "experts_tflops": "experts TFLOP/s", "softmax_forward_tflops": "softmax forward TFLOP/s",
              "softmax_backward_tflops": "backward TFLOP/s", "lightning_forward_ns": "lightning forward ns/token",
              "lightning_backward_ns": "backward ns/token", "copy_tbs": "copy TB/s", **REST},
    "step": {"tokens": "tokens a row", "documents": "documents", "table": "table", "step_s": "step s",
             "gpu_s": "GPU-seconds", "tokens_s": "tokens/s a GPU", "balance": "balance", "of_zigzag": "x zigzag",
             "expected_s": "expected s", "products_s": "of it products", "experts_s": "experts", "softmax_s": "softmax",
             "lightning_s": "lightning", "streams_s": "streams", "optimizer_s": "optimizer",
             "of_expected": "x expected", "loss": "loss", "predicted_gib": "predicted GiB",
             "reserved_gib": "reserved GiB", **REST},
}  # fmt: skip
"""Columns of each part's table, by the name of the figure; `softmax_long` has those of `softmax`."""


class Bench:
    """The processes, the figures so far, and the folder that they are written to.

    Attributes:
        group: the ranks that share a row: all.
        seconds: that the repetitions of one measurement may take; 0 repeats as little as can be.
        documents: lengths of the documents of each row, by a name.
    """

    def __init__(self, context: ParallelContext, out: Path, title: str, seconds: float, limit: float) -> None:
        self.context, self.out, self.title, self.seconds = context, out, title, seconds
        self.group: ProcessGroup = context.dense["cp"].get_group()
        self.device, self.rank, self.ranks = context.device, self.group.rank(), self.group.size()
        self.rows: list[Figures] = []
        self.documents: dict[str, list[int]] = {}
        self._stop = time.monotonic() + limit

    def case(self, part: str, label: Figures, measure: Callable[[], Figures]) -> Figures | None:
        """Measure, and keep what was found; None if a rank failed or the time is over. Every rank calls it."""
        failure, found = None, None
        (late,) = slowest([float(time.monotonic() > self._stop)], self.device)
        if late:
            failure = "no time left"
        else:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                found = measure()
            except Exception as error:
                traceback.print_exc()
                failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if failure:
                gc.collect()  # what the traceback held
            peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            failed, peak = slowest([float(found is None), float(peak)], self.device)
            if failed:
                found, failure = None, failure or "another rank failed"
            elif self.device.type == "cuda":
                found.setdefault("peak_gib", round(peak / 2**30, 2))
        self._keep({"part": part, **label, **({"note": failure} if found is None else found)})
        return found

    def _keep(self, row: Figures) -> None:
        """Print a row on the main process, below the head of its table if it is the first of it, and write all."""
        columns = _columns(row["part"])
        if self.context.is_main:
            if not self.rows or self.rows[-1]["part"] != row["part"]:
                print(f"\n{row['part']}\n{_head(columns)}", flush=True)
            print(_line(row, columns), flush=True)
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        """Write `context-N.json` and `.md`, with what other runs left there of parts that this one has no rows of."""
        if not self.context.is_main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"context-{self.ranks}.json"
        before = json.loads(path.read_text()) if path.exists() else {"rows": [], "documents": {}}
        mine = {row["part"] for row in self.rows}
        rows = [row for row in before["rows"] if row["part"] not in mine] + self.rows
        documents = before["documents"] | self.documents
        path.write_text(json.dumps({"title": self.title, "rows": rows, "documents": documents}) + "\n")
        lines = [self.title]
        for part in dict.fromkeys(row["part"] for row in rows):
            columns = _columns(part)
            lines += ["", f"## {part}", "", _head(columns)]
            lines += [_line(row, columns) for row in rows if row["part"] == part]
        if documents:
            lines += ["", "## Documents", ""]
            lines += [f"- {name}: {', '.join(map(str, lengths))}" for name, lengths in documents.items()]
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def check(found: list[Tensor], wanted: list[Tensor] | None) -> Figures:
    """Refuse results that are not finite; with wanted ones, the largest difference over the largest value on any rank.

    Raises:
        FloatingPointError: a result is not finite, on any rank.
    """
    finite = all(bool(x.isfinite().all()) for x in found)
    (bad,) = slowest([float(not finite)], found[0].device)
    if bad:
        raise FloatingPointError("a result is not finite")
    if wanted is None:
        return {}
    pairs = list(zip(found, wanted, strict=True))
    different = [float((a.float() - b.float()).abs().max()) for a, b in pairs]
    most = slowest([*different, *(float(b.abs().max()) for _, b in pairs)], found[0].device)
    errors = [a / max(b, 1e-30) for a, b in zip(most[: len(pairs)], most[len(pairs) :], strict=True)]
    return {"error": float(f"{max(errors):.2g}")}


def _columns(part: str) -> dict[str, str]:
    return COLUMNS[part.split("_")[0]]


def _head(columns: dict[str, str]) -> str:
    return "| " + " | ".join(columns.values()) + " |\n" + "|---" * len(columns) + "|"


def _line(row: Figures, columns: dict[str, str]) -> str:
    return "| " + " | ".join(str(row.get(name, "")) for name in columns) + " |"
