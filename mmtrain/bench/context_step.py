"""Whole training steps of rows that all GPUs share, with the same documents under two tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, product

import torch

from mmdata.rows.loader import PackedBatch
from mmtrain.bench.context_report import Bench, Figures
from mmtrain.bench.context_rows import mixture
from mmtrain.bench.timing import Clock, slowest
from mmtrain.build import meta_model
from mmtrain.config import ModelConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel.context.cut import RowCutter
from mmtrain.parallel.memory.predict import predict
from mmtrain.parallel.memory.workload import Workload
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.device import compute_dtype
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import train_step

TABLES = {"zigzag": 2, "balanced": 8}
"""Tables with their chunks a rank."""
LONG = 2**19
"""Tokens of a row from which on it has the mixture of 1M tokens, not that of 128K."""


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
    """A model that all processes share, with its optimizer."""

    def __init__(self, bench: Bench, config: ModelConfig, parallel: ParallelConfig, first: int = 0) -> None:
        self.bench, self.config, self.parallel, self.first = bench, config, parallel, first
        dtype = compute_dtype("auto", bench.device)
        self.model: ParallelModel = apply_parallel(meta_model(config), bench.context, parallel, dtype)
        self.model.initialise(0)
        self.optimizer = build_optimizer(self.model.module, OptimConfig())
        self.zigzag: dict[tuple[int, int], float] = {}

    def run(self, tokens: int, table: str, count: int, warm: bool) -> Figures:
        """Steps of one row each: of `count` rows, or of a single document where that is 0; `warm`: after such steps."""
        bench = self.bench
        options = replace(self.parallel, cp_table=table, cp_chunks=TABLES[table])
        self.model.cut = RowCutter(bench.ranks, bench.rank, options)
        name = "1M" if tokens >= LONG else "128K"
        seeds = range(self.first, self.first + count)
        lengths = [mixture(tokens, name, seed) for seed in seeds] if count else [(tokens,)]
        named = zip(seeds, lengths, strict=False)  # none of a single document
        bench.documents |= {f"step, {tokens} tokens, row {seed}": list(one) for seed, one in named}
        rows = [packed_row(one, self.config.vocab_size, seed) for seed, one in enumerate(lengths)]
        for row in rows if warm else []:
            self._step(row)
        seconds, results = zip(*(self._step(row) for row in rows), strict=True)
        if any(result.skipped for result in results):
            raise FloatingPointError("loss or gradient is not finite")
        mean = slowest([statistics.mean(seconds)], bench.device)[0]
        if table == "zigzag":
            self.zigzag[tokens, count] = mean
        found = {"step_s": round(mean, 4), "gpu_s": round(mean * bench.ranks, 1),
                 "tokens_s": round(tokens / mean / bench.ranks, 1),
                 "balance": round(statistics.mean(result.cp_balance or 1.0 for result in results), 4),
                 "loss": round(results[-1].loss, 4), **self._memory(tokens)}  # fmt: skip
        alone = self.zigzag.get((tokens, count))
        return found | ({} if alone is None else {"of_zigzag": round(alone / mean, 3)})

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
    lengths: Sequence[int],
    rows: Sequence[int] = (3,),
    tables: Sequence[str] = tuple(TABLES),
    warm: Sequence[int] = (1,),
    first: int = 0,
) -> None:
    """Measure steps at each number of tokens a row.

    Args:
        rows: numbers of rows with documents of their own, measured in turn; 0 is one row of one document.
        tables: of `TABLES`.
        warm: whether steps of the same rows go before, for each of `rows`.
        first: number of the first row, which draws its documents.
    """
    training: list[Training] = []

    def build() -> Figures:
        training.append(Training(bench, config, parallel, first))
        return {}

    if bench.case("step", {"table": f"{config.name}, built"}, build) is None:
        return
    for tokens, (count, before), table in product(lengths, list(zip(rows, warm, strict=True)), tables):
        label = {"tokens": tokens, "documents": "" if count else "one", "table": table}
        bench.case("step", label, partial(training[0].run, tokens, table, count, bool(before)))
    training.pop().model.close()
