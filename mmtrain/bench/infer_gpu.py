#!/usr/bin/env python
"""The inference engine on a GPU: decode steps beside the bytes that they must move, prefill beside the whole forward.

`python -m mmtrain.bench.infer_gpu --out DIR [--only NAME,...]`. Weights are random; what documents remember before a
timed step is filled in at random. Figures go to DIR/infer.json as they come:

- *step_ms*: median of whole steps of the engine, with scheduling and the choice of tokens, as a run has them;
- *device_ms*: median of the passes through the model alone;
- *floor_ms*: bytes of the weights once, of states read and written, of keys read, over the measured rate of a copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmtrain.bench.step_cases import CONFIGS
from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.infer.compute_dtype import cast_for_compute
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.document import Document, Status
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.scheduler import Chunk, Step
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing


@dataclass(frozen=True)
class Decode:
    """Documents of some length that get a token each.

    Attributes:
        model: a preset.
        documents: their number.
        context: tokens of each.
        graphs: as :class:`~mmtrain.infer.serving.options.EngineOptions` takes them.
    """

    model: str
    documents: int
    context: int
    graphs: bool | None = None


@dataclass(frozen=True)
class Prefill:
    """One prompt, in pieces of `piece` tokens."""

    model: str
    tokens: int
    piece: int


# fmt: off
CASES: dict[str, Decode | Prefill] = {
    "7b-decode-1-8k": Decode("hybrid_7b", 1, 2**13),
    "7b-decode-1-8k-no-graphs": Decode("hybrid_7b", 1, 2**13, graphs=False),
    "7b-decode-64-8k": Decode("hybrid_7b", 64, 2**13),
    "7b-decode-64-8k-no-graphs": Decode("hybrid_7b", 64, 2**13, graphs=False),
    "7b-decode-1-128k": Decode("hybrid_7b", 1, 2**17),
    "7b-decode-1-1m": Decode("hybrid_7b", 1, 2**20),
    "7b-decode-1-4m": Decode("hybrid_7b", 1, 2**22),
    "7b-prefill-128k": Prefill("hybrid_7b", 2**17, 2**14),
    "7b-prefill-128k-4k": Prefill("hybrid_7b", 2**17, 2**12),
    "7b-prefill-1m": Prefill("hybrid_7b", 2**20, 2**14),
    "1b-prefill-4m": Prefill("hybrid_1b", 2**22, 2**14),
}
# fmt: on


def served(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> HybridLM:
    """A model of random weights, made on the device in the dtype that it computes in."""
    model = meta_model(config)
    cast_for_compute(model, dtype)
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model.eval()


def model_config(name: str) -> ModelConfig:
    """A preset's architecture."""
    return compose(["stage=quickstart", f"model={name}", "data.path=none", "run.name=bench"], CONFIGS).model


def weight_bytes(model: HybridLM) -> int:
    """Bytes that a step reads of weights: all but the embedding, of which it reads a row a document."""
    embedding = model.embed_tokens.weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)


def floor_bytes(engine: Engine, model: HybridLM, documents: int, context: int) -> int:
    """Bytes that a decode step must move: weights once, each document's states in and out, its keys in."""
    keys = context * engine.plan.page_bytes // engine.plan.page_tokens
    return weight_bytes(model) + documents * (2 * engine.plan.slot_bytes + keys)


def filled(engine: Engine, documents: int, context: int) -> list[Document]:
    """Documents at work of which `context` tokens are remembered, and one more is to be read; at random."""
    memory, plan, made = engine.memory, engine.plan, []
    for layer in memory.layers:
        for name, std in (("states_SHKK", 0.1), ("k_PLGK", 1.0), ("v_PLGK", 1.0)):
            if hasattr(layer, name):
                getattr(layer, name).normal_(std=std)
    for number in range(documents):
        request = GenerationRequest((1,) * (context + 1), max_tokens=1 << 30, ignore_eod=True)
        document = Document(1 << 20 | number, request, list(request.tokens), None, computed=context)
        document.slot, document.status = memory.running.pop(), Status.RUNNING
        document.pages = array("q", memory.pages.take(plan.pages_of(context + 64)))
        made.append(document)
    return made


def decode(case: Decode, model: HybridLM, rate: float, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Figures of a decode case; `rate` in bytes/s."""
    slots = EngineOptions(max_running=case.documents, prefix_slots=0, cuda_graphs=case.graphs,
                          longest=case.context + 128)  # fmt: skip
    engine = Engine(model, options=slots)
    documents = filled(engine, case.documents, case.context)
    engine._scheduler.running += documents
    engine._documents |= {document.id: document for document in documents}
    whole, alone = [], []
    for _ in range(steps + 3):
        wait()
        began = time.perf_counter()
        engine.step()
        wait()
        whole.append(time.perf_counter() - began)
    chunks = [Chunk(document, 1) for document in documents]
    for _ in range(steps):
        began = time.perf_counter()
        engine._runner.run(Step([], chunks))
        wait()
        alone.append(time.perf_counter() - began)
    floor = floor_bytes(engine, model, case.documents, case.context) / rate
    step, passes = statistics.median(whole[3:]), statistics.median(alone)
    return {
        "step_ms": step * 1e3, "device_ms": passes * 1e3, "floor_ms": floor * 1e3, "of_floor": floor / step,
        "of_floor_device": floor / passes, "tokens_s": case.documents / step,
        "planned_gib": engine.plan.bytes / 2**30,
    }  # fmt: skip


def prefill(case: Prefill, model: HybridLM, wait: Callable[[], None]) -> dict[str, Any]:
    """Figures of a prefill case, beside the training forward pass (without a loss) where that fits."""
    options = EngineOptions(max_running=1, prefix_slots=0, prefill_tokens=case.piece, longest=case.tokens + 64)
    engine = Engine(model, options=options)
    tokens = tuple(torch.randint(model.config.vocab_size, (case.tokens,)).tolist())
    seconds = []
    for _ in range(2):
        wait()
        began = time.perf_counter()
        engine.generate([GenerationRequest(tokens, max_tokens=1)])
        wait()
        seconds.append(time.perf_counter() - began)
    found = {"seconds": seconds[-1], "tokens_s": case.tokens / seconds[-1]}
    del engine
    gc.collect()
    try:
        found["forward_tokens_s"] = case.tokens / forward_seconds(model, tokens, wait)
        found["of_forward"] = found["tokens_s"] / found["forward_tokens_s"]
    except torch.OutOfMemoryError:
        found["forward_tokens_s"] = "does not fit"
    return found


@torch.no_grad()
def forward_seconds(model: HybridLM, tokens: Sequence[int], wait: Callable[[], None]) -> float:
    """Seconds of the training forward pass over a row of one document, the second time."""
    device = model.embed_tokens.weight.device
    tokens_T, packing = torch.tensor(tokens, device=device), Packing.from_lengths([len(tokens)], device)
    for _ in range(2):
        wait()
        began = time.perf_counter()
        model.final_states(tokens_T, packing)
        wait()
    return time.perf_counter() - began


def copy_rate(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes/s that a copy reads and writes on the device."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--only", default=",".join(CASES), help="cases with commas between them")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name]
    for name in names:
        if name not in CASES:
            raise ConfigError("--only", name, "is no case", f"give some of {', '.join(CASES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0)
    rate = copy_rate(device)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": rate / 1e9}
    rows: list[dict[str, Any]] = []
    models: dict[str, HybridLM] = {}
    for name in sorted(names, key=lambda name: CASES[name].model):  # a model is made once
        case = CASES[name]
        if case.model not in models:
            models.clear()
            gc.collect()
            torch.cuda.empty_cache()
            models[case.model] = served(model_config(case.model), device, torch.bfloat16)
        try:
            wait, model = torch.cuda.synchronize, models[case.model]
            if isinstance(case, Decode):
                figures = decode(case, model, rate, options.steps, wait)
            else:
                figures = prefill(case, model, wait)
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        torch.cuda.empty_cache()
        rows.append({"case": name, **figures})
        print(json.dumps(rows[-1]), flush=True)
        (options.out / "infer.json").write_text(json.dumps({**machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
