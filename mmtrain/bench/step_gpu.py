#!/usr/bin/env python
"""Whole training steps on one GPU: tokens/s, MFU, and the share of the step in which the GPU is busy.

`torchrun --standalone --nproc-per-node 1 -m mmtrain.bench.step_gpu --out DIR [--only NAME,...] [--graphs both]`. Rows
are of random tokens in documents of random lengths. Figures go to DIR/step.json as they come:

- *seconds*: median of steps that nothing watches, one after the other, as a run has them;
- *busy*: union of the intervals of all kernels of one profiled step, over those seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmdata.rows.loader import PackedBatch
from mmkernels.softmax import dispatch
from mmtrain.bench.context_step import packed_row
from mmtrain.bench.step_peers import measure_llama
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.config.cli import compose
from mmtrain.log.kernel_times import profile
from mmtrain.model.init import meta_model
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.memory.predict import MemoryPrediction, predict
from mmtrain.parallel.memory.workload import Workload
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.device import compute_dtype, peak_rate
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import train_step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SOFTMAX_ONLY = "model.layer_pattern=S"
EXPERTS = ("model.num_experts=8", "model.ffn_hidden_size=1408", "model.top_k=2")
SEVENTY = ("model.num_layers=12", "model.hidden_size=640", "model.num_heads=10", "model.head_dim=64",
           "model.rotary_dim=32", "model.ffn_hidden_size=1792", "model.num_experts=0", SOFTMAX_ONLY)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and the micro-batches of its step.

    Attributes:
        model: a preset.
        overrides: of it.
        rows: of a micro-batch.
        micro_batches: of a step.
        seq_len: tokens of a row.
        mean_document: tokens of a document, on average; 0: each row is one document.
        parallel: options of the layout.
    """

    model: str
    overrides: tuple[str, ...] = ()
    rows: int = 1
    micro_batches: int = 4
    seq_len: int = 8192
    mean_document: int = 1000
    parallel: dict[str, Any] = field(default_factory=dict)


# fmt: off
CASES: dict[str, Case] = {
    "410m": Case("hybrid_410m"),
    "410m-4rows": Case("hybrid_410m", rows=4, micro_batches=2),
    "410m-softmax": Case("hybrid_410m", (SOFTMAX_ONLY,)),
    "410m-softmax-one-document": Case("hybrid_410m", (SOFTMAX_ONLY,), mean_document=0),
    "1b": Case("hybrid_1b"),
    "1b-2rows": Case("hybrid_1b", rows=2, micro_batches=2),
    "1b-softmax": Case("hybrid_1b", (SOFTMAX_ONLY,)),
    "1b-softmax-one-document": Case("hybrid_1b", (SOFTMAX_ONLY,), mean_document=0),
    "1b-experts-2rows": Case("hybrid_1b", EXPERTS, rows=2),
    "100m": Case("proxy_100m"),
    "70m-softmax": Case("proxy_100m", SEVENTY),
    "100m-4rows": Case("proxy_100m", rows=4, micro_batches=2),
    "100m-16k-recompute": Case("proxy_100m", seq_len=16384, parallel={"activation_checkpoint": "block"}),
    "410m-32k": Case("hybrid_410m", seq_len=2**15, micro_batches=1, parallel={"activation_checkpoint": "block"}),
    "410m-128k": Case("hybrid_410m", seq_len=2**17, micro_batches=1, parallel={"activation_checkpoint": "block"}),
    "410m-512k": Case("hybrid_410m", seq_len=2**19, micro_batches=1, parallel={"activation_checkpoint": "block"}),
    "7b-mixers": Case("hybrid_7b", ("model.num_layers=4", "model.layer_pattern=L", "model.ffn_hidden_size=512",
                                    "model.vocab_size=4096"), seq_len=2**16, micro_batches=1,
                      parallel={"activation_checkpoint": "block"}),
    "410m-recompute": Case("hybrid_410m", parallel={"activation_checkpoint": "block"}),
}
# fmt: on


def batch(case: Case, vocabulary: int, seed: int) -> PackedBatch:
    """A micro-batch of rows of documents whose lengths are exponentially distributed, at least 16 tokens each."""
    rng = random.Random(seed)
    rows = [packed_row(_lengths(case, rng), vocabulary, seed * 64 + row) for row in range(case.rows)]
    offsets = [row.cu_seqlens[1:] + number * case.seq_len for number, row in enumerate(rows)]
    joined = {name: torch.cat([getattr(row, name) for row in rows])
              for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS")}  # fmt: skip
    return PackedBatch(
        **joined, cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), *offsets]).int(), rows=(seed,)
    )


def _lengths(case: Case, rng: random.Random) -> list[int]:
    left, found = case.seq_len, []
    while left:
        length = min(left, 16 + int(rng.expovariate(1 / case.mean_document))) if case.mean_document else left
        found.append(length)
        left -= length
    return found


class Training:
    """One model on this GPU and its optimizer."""

    def __init__(self, context: mesh.ParallelContext, case: Case, graphs: bool) -> None:
        given = ["stage=quickstart", f"model={case.model}", "data.path=none", "run.name=bench", *case.overrides]
        self.context, self.case = context, case
        self.config: ModelConfig = compose(given, CONFIGS).model
        dtype = compute_dtype("auto", context.device)
        self.parallel = parallel = ParallelConfig(
            micro_batch_rows=case.rows, cuda_graphs="auto" if graphs else False, **case.parallel
        )
        self.model = apply_parallel(meta_model(self.config), context, parallel, dtype)
        self.model.initialise(0)
        self.optimizer = build_optimizer(self.model.module, OptimConfig())
        self.steps = [
            [batch(case, self.config.vocab_size, step * case.micro_batches + i) for i in range(case.micro_batches)]
            for step in range(4)
        ]
        self.peak = peak_rate(context.device, dtype)

    def predicted(self) -> MemoryPrediction:
        """The peak of memory as a run tells it before it starts."""
        case = self.case
        return predict(Workload(self.config, self.parallel, self.context.layout, case.seq_len, case.micro_batches, 2))

    def step(self, number: int) -> StepResult:
        """Train one step."""
        batches = self.steps[number % len(self.steps)]
        return train_step(self.model, self.optimizer, batches, 1e-5, self.config.rope_base, clip_grad=1.0)


def measure(context: mesh.ParallelContext, case: Case, graphs: bool, steps: int) -> dict[str, Any]:
    """Figures of one case."""
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    training = Training(context, case, graphs)
    first = training.step(0)
    torch.cuda.synchronize()
    until_first = time.perf_counter() - began
    losses = [first.loss, *(training.step(i).loss for i in (1, 2))]
    seconds, results = [], []
    for i in range(steps):
        start = time.perf_counter()
        results.append(training.step(i))  # reading its figures waits for the device
        seconds.append(time.perf_counter() - start)
    times = profile(lambda: training.step(0))
    step, tokens = statistics.median(seconds), case.rows * case.seq_len * case.micro_batches
    flops = statistics.median(result.flops for result in results)
    found = {
        "graphs": graphs,
        "step_s": round(step, 4),
        "tokens_s": round(tokens / step),
        "mfu": round(flops / step / training.peak, 4),
        "busy": round(times.busy_seconds / step, 3),
        "busy_s": round(times.busy_seconds, 4),
        "peak_gib": round(training.model.peak_bytes() / 2**30, 2),
        "predicted_gib": round(training.predicted().gib, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_step_s": round(until_first, 2),
        "losses": losses,
        "grad_norm": results[-1].grad_norm,
        "kernels": len(times.runs),
        "kinds_ms": {kind: round(one.seconds * 1e3, 2) for kind, one in times.by_kind().items()},
        "longest_ms": {name[:90]: round(one.seconds * 1e3, 2) for name, one in list(times.by_name().items())[:22]},
        "gaps_ms": [(round(s * 1e3, 2), before[:40], after[:40]) for s, before, after in times.gaps()[:5]],
    }
    training.model.close()
    return found


def measure_peer(case: Case, graphs: bool, steps: int) -> dict[str, Any]:
    """Figures of transformers' Llama of a case's shape."""
    given = ["stage=quickstart", f"model={case.model}", "data.path=none", "run.name=bench", *case.overrides]
    return measure_llama(compose(given, CONFIGS).model, case.seq_len, case.micro_batches, steps, graphs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, with commas between them")
    parser.add_argument("--graphs", choices=("on", "off", "both"), default="on")
    parser.add_argument("--peers", default="", help="cases whose shape transformers' Llama is measured in, likewise")
    parser.add_argument("--peer-graphs", action="store_true", help="the peer with CUDA graphs too")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--long", type=int, default=dispatch.LONG, help="tokens from which on a document has a call")
    options = parser.parse_args(arguments)
    dispatch.LONG = options.long
    options.out.mkdir(parents=True, exist_ok=True)
    context = mesh.start(ClusterConfig())
    found: list[dict[str, Any]] = []

    def note(name: str, run: Callable[[], dict[str, Any]]) -> None:
        try:
            figures = run()
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        torch.cuda.empty_cache()
        found.append({"case": name, "long": options.long, **figures})
        print(name, json.dumps({k: v for k, v in figures.items() if not k.endswith("_ms")}), flush=True)
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        (options.out / "step.json").write_text(json.dumps({**machine, "rows": found}, indent=1))

    for name in filter(None, options.only.split(",")):
        for graphs in {"on": [True], "off": [False], "both": [False, True]}[options.graphs]:
            note(name, partial(measure, context, CASES[name], graphs, options.steps))
    for name in filter(None, options.peers.split(",")):
        for graphs in [False, True] if options.peer_graphs else [False]:
            note(name, partial(measure_peer, CASES[name], graphs, options.steps))
    mesh.stop()


if __name__ == "__main__":
    main()
