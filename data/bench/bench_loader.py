"""Rows and tokens a second out of the loader, for both packings at 1,024 and 8,192 tokens.

    python data/bench/bench_loader.py [--corpus corpora/stdlib/train] [--workers 0]

Without `--corpus` it makes one of 10 million random tokens, with document lengths spread like source code's. Prints
one JSON line a case: `row_us` is `RowStream[i]` alone, the rest is whole micro-batches through `micro_batches`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.writer import CorpusWriter
from mmdata.rows.loader import micro_batches
from mmdata.rows.stream import RowStream

_TOKENS_TIMED = 8_000_000


def synthetic(folder: Path, tokens: int = 10_000_000) -> Path:
    """A corpus of random documents, written for the measurement."""
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 4096, tokens).astype(np.uint16)
    lengths = np.clip(rng.lognormal(7.5, 1.4, tokens // 1000).astype(np.int64), 1, 200_000)
    stops = np.minimum(np.cumsum(lengths), tokens)
    with CorpusWriter(folder / "synthetic", np.dtype(np.uint16)) as writer:
        for start, stop in pairwise(stops):
            if stop > start:
                writer.add(flat[start:stop])
    return folder / "synthetic"


def measure(corpus: IndexedCorpus, packing: str, seq_len: int, workers: int) -> dict[str, object]:
    """Rows and tokens a second of one packing."""
    stream = RowStream(corpus, seq_len=seq_len, seed=0, packing=packing, eod_id=0, vocab_size=1 << 16)
    start = time.perf_counter()
    stream[0]
    plan_ms = (time.perf_counter() - start) * 1e3
    rows = _TOKENS_TIMED // seq_len
    start = time.perf_counter()
    for i in range(rows):
        stream[i]
    row_us = (time.perf_counter() - start) / rows * 1e6
    size = max(1, 8192 // seq_len)
    batches = [range(i, i + size) for i in range(0, rows, size)]
    loader = micro_batches(stream, batches, num_workers=workers)
    first = len(next(loader).rows)  # the processes are up
    start = time.perf_counter()
    done = sum(len(batch.rows) for batch in islice(loader, len(batches)))
    seconds = time.perf_counter() - start
    assert done + first == sum(len(batch) for batch in batches)
    return {
        "bench": "loader",
        "packing": packing,
        "seq_len": seq_len,
        "workers": workers,
        "plan_ms": round(plan_ms, 1),
        "row_us": round(row_us, 1),
        "rows_s": round(done / seconds),
        "tokens_s": round(done / seconds * seq_len),
        "efficiency": round(stream.efficiency(), 4),
    }


def main() -> None:
    """Measure every packing and length, a JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = IndexedCorpus(args.corpus or synthetic(Path(folder)))
        for workers in args.workers:
            for packing in ("concat", "best_fit"):
                for seq_len in (1024, 8192):
                    print(json.dumps(measure(corpus, packing, seq_len, workers)), flush=True)


if __name__ == "__main__":
    main()
