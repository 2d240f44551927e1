"""Throughput of mmdata.prepare.pipeline beside `tokenizers.encode_batch` alone: the same text, cores and run.

    python data/bench/bench_prepare.py [--recipe stdlib] [--vocab-size 4096] [--repeats 2]

Trains one tokenizer first (not timed). `encode_batch` is given all texts in memory at once and its ids are not even
taken out; `prepare` is timed from files to a finished, synced corpus folder, with the start of its processes and the
import of megatron-core. Each is run `--repeats` times, in turns, and the best of each counts. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from mmdata.prepare.bpe import Sample, tokenizer_threads, train_bpe
from mmdata.prepare.collect import collect, plan_shards
from mmdata.prepare.pipeline import PrepareOptions, prepare
from mmdata.prepare.pool import cores
from mmdata.prepare.recipes import recipe_files
from mmdata.prepare.sources import Document, read_piece

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def encode_batch_seconds(path: Path, texts: list[str]) -> float:
    """Seconds that `tokenizers` alone takes, on all cores."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path))
    with tokenizer_threads(True):
        start = time.perf_counter()
        backend.encode_batch(texts, add_special_tokens=False)
        return time.perf_counter() - start


def prepare_seconds(path: Path, files: list[Path], output: Path) -> float:
    """Seconds from files to a finished corpus folder."""
    options = PrepareOptions(inputs=files, output=output, tokenizer=str(path))
    start = time.perf_counter()
    prepare(options)
    return time.perf_counter() - start


def main() -> None:
    """Measure both in turns and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="stdlib")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    files = recipe_files(args.recipe, RECIPES)
    shards = plan_shards(collect(files)[0])
    items = [item for shard in shards for piece in shard for item in read_piece(piece, "text")]
    documents = [item for item in items if isinstance(item, Document)]
    size = sum(len(document.data) for document in documents)
    texts = [document.text for document in documents]
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        train_bpe(Sample(shards, "text"), args.vocab_size, path)
        for i in range(args.repeats):
            # prepare first: the parent has not imported megatron-core yet, so its import is in the time
            whole.append(prepare_seconds(path, files, Path(folder) / f"corpus{i}"))
            alone.append(encode_batch_seconds(path, texts))
    result = {
        "bench": "prepare",
        "text_mb": round(size / 1e6, 1),
        "cores": cores(),
        "load_1min": round(os.getloadavg()[0], 1),
        "encode_batch_mb_s": round(size / min(alone) / 1e6, 2),
        "prepare_mb_s": round(size / min(whole) / 1e6, 2),
        "prepare_first_mb_s": round(size / whole[0] / 1e6, 2),
        "ratio": round(min(alone) / min(whole), 2),
        "ratio_first": round(min(alone) / whole[0], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
