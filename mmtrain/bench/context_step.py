"""Whole training steps of rows that all GPUs share, the same documents under two tables, beside what is expected."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, product

import torch

from mmdata.rows.loader import PackedBatch
from mmtrain.bench.context_cases import StepCase
from mmtrain.bench.context_expected import PARTS, Rates, expected_seconds
from mmtrain.bench.context_rates import measure_rates
from mmtrain.bench.context_report import Bench, Figures
from mmtrain.bench.timing import Clock, slowest
from mmtrain.build import meta_model
from mmtrain.config import ModelConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel.context.cut import RowCutter
from mmtrain.parallel.layout import keeps_whole_weights
from mmtrain.parallel.memory.predict import predict
from mmtrain.parallel.memory.workload import Workload
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.device import compute_dtype
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import train_step

TABLES = {"zigzag": 2, "balanced": 8}
"""Tables with their chunks a rank."""


def packed_row(lengths: Sequence[int], vocabulary: int, seed: int) -> PackedBatch:
    """A row of random tokens in documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (sum(lengths) + 1,), generator=generator)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    mask_BS = torch.ones(1, sum(lengths), dtype=torch.bool)
    mask_BS[0, bounds[1:].long() - 1] = False
    positions_BS = torch.cat([torch.arange(n) for n in lengths])[None]
    return PackedBatch(tokens[None, :-1], tokens[None, 1:], mask_BS, positions_BS, bounds, (seed,))


class Training:
    """A model that all processes share, with its optimizer.

    Args:
        first: number of the first row, which draws its documents.
        rates: what steps are compared with, by tokens of a row and whether it is a single document.
    """

    def __init__(
        self,
        bench: Bench,
        config: ModelConfig,
        parallel: ParallelConfig,
        first: int = 0,
        rates: Mapping[tuple[int, bool], Rates] | None = None,
    ) -> None:
        self.bench, self.config, self.parallel, self.first, self.rates = bench, config, parallel, first, rates or {}
        dtype = compute_dtype("auto", bench.device)
        self.model: ParallelModel = apply_parallel(meta_model(config), bench.context, parallel, dtype)
        self.model.initialise(0)
        self.optimizer = build_optimizer(self.model.module, OptimConfig())
        self.zigzag: dict[tuple[int, int], float] = {}

    def run(self, case: StepCase, table: str) -> Figures:
        """Steps of one row each."""
        bench, tokens = self.bench, case.tokens
        options = replace(self.parallel, cp_table=table, cp_chunks=TABLES[table])
        self.model.cut = RowCutter(bench.ranks, bench.rank, options)
        lengths = case.documents(self.first)
        if case.rows:
            named = enumerate(lengths, self.first)
            bench.documents |= {f"step, {tokens} tokens, row {seed}": list(one) for seed, one in named}
        rows = [packed_row(one, self.config.vocab_size, seed) for seed, one in enumerate(lengths)]
        for row in rows if case.warm else []:
            self._step(row)
        seconds, results = zip(*(self._step(row) for row in rows), strict=True)
        if any(result.skipped for result in results):
            raise FloatingPointError("loss or gradient is not finite")
        mean = slowest([statistics.mean(seconds)], bench.device)[0]
        if table == "zigzag":
            self.zigzag[tokens, case.rows] = mean
        found = {"step_s": round(mean, 4), "gpu_s": round(mean * bench.ranks, 1),
                 "tokens_s": round(tokens / mean / bench.ranks, 1),
                 "balance": round(statistics.mean(result.cp_balance or 1.0 for result in results), 4),
                 "loss": round(results[-1].loss, 4), **self._memory(tokens)}  # fmt: skip
        alone = self.zigzag.get((tokens, case.rows))
        found |= {} if alone is None else {"of_zigzag": round(alone / mean, 3)}
        return found | self._expected(case, lengths, results, mean)

    def _expected(
        self, case: StepCase, lengths: Sequence[Sequence[int]], results: Sequence[StepResult], mean: float
    ) -> Figures:
        """What operations and rates say of these rows: seconds, by part, and the measured ones over them."""
        rates, model = self.rates.get((case.tokens, not case.rows)), self.config
        if rates is None:
            return {}
        sums, parts = keeps_whole_weights(self.bench.context.layout, self.parallel), dict.fromkeys(PARTS, 0.0)
        for one, result in zip(lengths, results, strict=True):
            kept = case.tokens * model.top_k * sum(1 - rate for rate in result.drop_rate)
            row = expected_seconds(model, self.parallel, one, rates, self.bench.ranks, sums, kept)
            parts = {part: parts[part] + row[part] / len(lengths) for part in PARTS}
        whole = sum(parts.values())
        named = {f"{part}_s": float(f"{seconds:.4g}") for part, seconds in parts.items()}
        return {"expected_s": float(f"{whole:.4g}"), **named, "of_expected": round(mean / whole, 3)}

    def _memory(self, tokens: int) -> Figures:
        """What was predicted of a GPU, and what its allocator took of it, in GiB."""
        bench, parallel = self.bench, self.parallel
        work = Workload(self.config, parallel, bench.context.layout, tokens, 1, compute_bytes=2)
        found = {"predicted_gib": round(predict(work).gib, 2)}
        if bench.device.type == "cuda":
            (reserved,) = slowest([float(torch.cuda.max_memory_reserved())], bench.device)
            found["reserved_gib"] = round(reserved / 2**30, 2)
        return found

    def _step(self, row: PackedBatch) -> tuple[float, StepResult]:
        clock = Clock(self.bench.device)
        clock.wait()
        began = time.perf_counter()
        result = train_step(self.model, self.optimizer, [row], 1e-5, self.config.rope_base, clip_grad=1.0)
        clock.wait()
        return time.perf_counter() - began, result


def measure_step(
    bench: Bench,
    config: ModelConfig,
    parallel: ParallelConfig,
    cases: Sequence[StepCase],
    tables: Sequence[str] = tuple(TABLES),
    first: int = 0,
) -> None:
    """Measure the rates that steps are compared with, and then steps of each case under each table.

    Args:
        tables: of `TABLES`.
        first: number of the first row, which draws its documents.
    """
    training: list[Training] = []
    rates = measure_rates(bench, config, parallel, cases, first)  # as long as no model fills the GPU

    def build() -> Figures:
        training.append(Training(bench, config, parallel, first, rates))
        return {}

    if bench.case("step", {"table": f"{config.name}, built"}, build) is None:
        return
    for case, table in product(cases, tables):
        label = {"tokens": case.tokens, "documents": "" if case.rows else "one", "table": table}
        bench.case("step", label, partial(training[0].run, case, table))
    training.pop().model.close()
