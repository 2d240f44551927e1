#!/usr/bin/env python
"""Processor time to make one sample of each task of `launch/eval.py`, from a prepared corpus with held-out text.

`python -m mmtrain.bench.evals_samples_cpu --corpus DIR --out FOLDER` writes FOLDER/samples.json: of each task seconds
of the median sample, of the longest, and of the first, which is among neither (a list's numbers are turned to tokens
for it, once for all). The corpus's own tokenizer makes the words, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdata.corpus.open import open_corpus, tokenizer_path
from mmdata.tokenizer import load_tokenizer
from mmtrain.config.evals import NEEDLE_KINDS
from mmtrain.config.schema import parse_count
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.perplexity import text_row
from mmtrain.evals.ruler.prompt import Kit
from mmtrain.evals.ruler.registry import TASKS, depth_of, make_prompt
from mmtrain.evals.sample import Cell, SampleBuilder

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def makers(kit: Kit, length: int) -> dict[str, Callable[[int], Any]]:
    """What makes sample i of each task."""
    builder = SampleBuilder(kit.haystack, kit.tokenizer, 0)
    found: dict[str, Callable[[int], Any]] = {
        task: lambda i, task=task: make_prompt(kit, 0, task, length, depth_of(task, DEPTHS, i), i) for task in TASKS
    }
    found |= {kind: lambda i, kind=kind: builder.build(Cell(kind, length, DEPTHS[i % 5]), i) for kind in NEEDLE_KINDS}
    if length <= kit.haystack.num_tokens:
        found["perplexity"] = lambda i: text_row(kit.haystack, length, 0, i)
    return found


def main() -> None:
    """Time them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--length", default="1Mi", help="tokens (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, length = load_tokenizer(tokenizer_path(options.corpus)), parse_count(options.length, "--length")
    _, held_out = open_corpus(options.corpus, vocab_size=tokenizer.vocab_size, valid_fraction=0.1, seed=0)
    kit = Kit(tokenizer, Haystack(held_out, options.corpus, tokenizer, tokenizer.vocab_size))
    record: dict[str, Any] = {"tokens": length, "vocabulary": tokenizer.vocab_size,
                              "held_out_tokens": kit.haystack.num_tokens, "tasks": {}}  # fmt: skip
    for task, make in makers(kit, length).items():
        took = []
        for i in range(options.repeats + 1):
            began = time.process_time()
            make(i)
            took.append(time.process_time() - began)
        record["tasks"][task] = [round(one, 4) for one in (statistics.median(took[1:]), max(took[1:]), took[0])]
        print(task, *record["tasks"][task], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "samples.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
