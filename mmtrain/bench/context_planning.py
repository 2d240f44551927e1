"""What the host does for each row before ranks can share it, and how even the work of softmax layers then is.

Rows of the long stages' mixtures of lengths. Each rank plans, at the same time; the times are the main process's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from mmtrain.bench.context_report import Bench, Figures
from mmtrain.bench.context_rows import mixture
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.context.row_shard import ContextPacking, RowShard
from mmtrain.parallel.context.softmax_cp import plan_of

TABLES = (("balanced", 8), ("balanced", 4), ("zigzag", 2))
"""Tables with their chunks a rank."""


def plan_row(bench: Bench, whole: Packing, cp: int, table: str, chunks: int) -> tuple[list[float], float]:
    """Milliseconds of the table, of the cut and of the tails' plan of one rank, and the balance."""
    marks = [time.perf_counter()]
    shard = RowShard.plan(whole.lengths, chunks * cp, cp, bench.rank % cp, table)
    marks.append(time.perf_counter())
    packing = ContextPacking.cut(whole, shard)
    marks.append(time.perf_counter())
    plan, _ = plan_of(packing)
    _ = plan.crosses, plan.needed, plan.sends, plan.receives, plan.steps  # worked out by the first layer that asks
    marks.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in pairwise(marks)], shard.balance


def plan_rows(bench: Bench, tokens: int, name: str, cp: int, table: str, chunks: int, rows: int) -> Figures:
    """Medians over rows, after a first one."""
    found = []
    for seed in range(rows + 1):
        whole = Packing.from_lengths(list(mixture(tokens, name, seed)), bench.device)
        found.append(plan_row(bench, whole, cp, table, chunks))
    times, balance = zip(*found[1:], strict=True)
    medians = [round(statistics.median(one), 3) for one in zip(*times, strict=True)]
    together = [sum(one) for one in times]
    return {
        **dict(zip(("plan_ms", "cut_ms", "tails_ms"), medians, strict=True)),
        "total_ms": round(statistics.median(together), 3), "longest_ms": round(max(together), 3),
        "balance": round(statistics.mean(balance), 4), "worst": round(float(np.percentile(balance, 95)), 4),
    }  # fmt: skip


def measure_planning(bench: Bench, lengths: Sequence[tuple[str, int]], ranks: Sequence[int], rows: int) -> None:
    """Measure every table for each mixture and number of ranks, which need not be those at hand."""
    for name, tokens in lengths:
        for cp in ranks:
            for table, chunks in TABLES:
                label = {"row": f"{tokens} tokens, {name}", "cp": cp, "table": table, "chunks": chunks}
                bench.case("planning", label, partial(plan_rows, bench, tokens, name, cp, table, chunks, rows))
