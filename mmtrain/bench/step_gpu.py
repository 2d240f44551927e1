#!/usr/bin/env python
"""Whole training steps on GPUs: tokens/s, MFU, and the share of the step in which the GPU is busy.

`torchrun --standalone --nproc-per-node N -m mmtrain.bench.step_gpu --out DIR [--only NAME,...] [--graphs both]
[--peers PEER:NAME,...]`. Rows are of random tokens in documents of random lengths; several GPUs are data parallel, and
figures are a GPU's. They go to DIR/step.json as they come:

- *seconds*: median of steps that nothing watches, one after the other, as a run has them;
- *busy*: union of the intervals of all kernels of one profiled step, over those seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmkernels.softmax import dispatch
from mmtrain.bench.step_cases import CASES, STEPS, Case, batches, model_config
from mmtrain.bench.step_peers import PEERS, measure_peer, parse_peers
from mmtrain.bench.timing import slowest
from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.log.kernel_times import profile
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.memory.predict import MemoryPrediction, predict
from mmtrain.parallel.memory.workload import Workload
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.device import compute_dtype, peak_rate
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import train_step


class Training:
    """One model on these GPUs and its optimizer."""

    def __init__(self, context: mesh.ParallelContext, case: Case, graphs: bool) -> None:
        self.context, self.case, self.config = context, case, model_config(case)
        dtype = compute_dtype("auto", context.device)
        # Gathered weights are kept through the step, which no case here is too large for: the fastest of several GPUs.
        options = {"cuda_graphs": "auto" if graphs else False, "reshard_after_forward": False, **case.parallel}
        self.parallel = parallel = ParallelConfig(micro_batch_rows=case.rows, **options)
        self.model = apply_parallel(meta_model(self.config), context, parallel, dtype)
        self.model.initialise(0)
        self.optimizer = build_optimizer(self.model.module, OptimConfig())
        vocabulary = self.config.vocab_size
        self.steps = [batches(case, vocabulary, step, context.rank) for step in range(STEPS)]
        self.peak = peak_rate(context.device, dtype) * context.layout.world

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
    step = slowest([statistics.median(seconds)], context.device)[0]
    flops = statistics.median(result.flops for result in results)
    found = {
        "graphs": graphs,
        "gpus": context.layout.world,
        "step_s": round(step, 4),
        "tokens_s": round(case.tokens / step),  # of a GPU
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--only", default=",".join(CASES), help="cases with commas between them; may be empty")
    parser.add_argument("--graphs", choices=("on", "off", "both"), default="on")
    parser.add_argument("--peers", default="", help=f"PEER:CASE with commas between them; peers: {', '.join(PEERS)}")
    parser.add_argument("--peer-graphs", action="store_true", help="llama and megatron with CUDA graphs too")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--long", type=int, default=dispatch.LONG, help="tokens from which on a document has a call")
    options = parser.parse_args(arguments)
    cases, peers = _cases(options.only), parse_peers(options.peers)
    dispatch.LONG = options.long
    options.out.mkdir(parents=True, exist_ok=True)
    context = mesh.start(ClusterConfig(device="cuda"))
    note = Notes(options.out / "step.json", context.is_main, options.long)
    for name in cases:
        for graphs in {"on": [True], "off": [False], "both": [False, True]}[options.graphs]:
            note(name, partial(measure, context, CASES[name], graphs, options.steps))
    for peer, name in peers:
        for graphs in [False, True] if options.peer_graphs and PEERS[peer].graphs else [False]:
            note(name, partial(measure_peer, peer, CASES[name], context, options.steps, graphs))
    mesh.stop()


class Notes:
    """The file of all figures, which rank 0 writes anew after each case; a case that fails is an entry too."""

    def __init__(self, path: Path, writes: bool, long: int) -> None:
        self.path, self.writes, self.long = path, writes, long
        self.rows: list[dict[str, Any]] = []

    def __call__(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run a case and keep its figures."""
        try:
            figures = run()
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        torch.cuda.empty_cache()
        self.rows.append({"case": name, "long": self.long, **figures})
        if not self.writes:
            return
        print(name, json.dumps({k: v for k, v in figures.items() if not k.endswith("_ms")}), flush=True)
        machine = {"device": torch.cuda.get_device_name(), "gpus": dist.get_world_size(), "torch": torch.__version__,
                   "cuda": torch.version.cuda}  # fmt: skip
        self.path.write_text(json.dumps({**machine, "rows": self.rows}, indent=1))


def _cases(given: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    for name in names:
        if name not in CASES:
            raise ConfigError("--only", name, "is no case", f"give some of {', '.join(CASES)}")
    return names


if __name__ == "__main__":
    main()
