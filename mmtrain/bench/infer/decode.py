"""Decode steps beside the bytes that they must move.

What documents remember before a timed step is filled in at random.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable
from typing import Any

from mmtrain.bench.infer.cases import Decode
from mmtrain.bench.infer.models import ServedModel, read_bytes
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.document import Document, Status
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.scheduler import Chunk, Step
from mmtrain.model.model import HybridLM

WARMUP = 3
_ROOM = 64  # tokens that a document may get in a measurement


def decode(case: Decode, served: ServedModel, rate: float, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Figures of a decode case.

    Args:
        case: documents and their length.
        served: the model.
        rate: bytes/s of a copy on the device.
        steps: timed ones; at most 60.
        wait: lets the host wait for the device.
    """
    options = EngineOptions(max_running=case.documents, prefix_slots=0, cuda_graphs=case.graphs,
                            longest=case.context + 2 * _ROOM)  # fmt: skip
    engine = Engine(served.model, options=options)
    documents = at_work(engine, case.documents, case.context)
    whole = step_seconds(engine, steps + WARMUP, wait)[WARMUP:]
    chunks = [Chunk(document, 1) for document in documents]
    alone = []
    for _ in range(steps):
        began = time.perf_counter()
        engine._runner.run(Step([], chunks))
        wait()
        alone.append(time.perf_counter() - began)
    moved = floor_bytes(engine, served.model, case.documents, case.context)
    step, passes, floor = statistics.median(whole), statistics.median(alone), moved / rate
    return {
        "context": case.context, "documents": case.documents, "step_ms": step * 1e3, "device_ms": passes * 1e3,
        "floor_ms": floor * 1e3, "floor_bytes": moved, "of_floor": floor / step, "of_floor_device": floor / passes,
        "tokens_s": case.documents / step, "planned_gib": engine.plan.bytes / 2**30,
        "weights_gib": served.weights / 2**30, "weights_of_plan": served.weights / served.planned,
    }  # fmt: skip


def step_seconds(engine: Engine, steps: int, wait: Callable[[], None]) -> list[float]:
    """Seconds of whole steps of an engine, with scheduling and the choice of tokens."""
    seconds = []
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        engine.step()
        wait()
        seconds.append(time.perf_counter() - began)
    return seconds


def floor_bytes(engine: Engine, model: HybridLM, documents: int, context: int) -> int:
    """Bytes that a decode step must move: weights once, each document's states in and out, its keys in."""
    keys = context * engine.plan.page_bytes // engine.plan.page_tokens
    return read_bytes(model) + documents * (2 * engine.plan.slot_bytes + keys)


def at_work(engine: Engine, documents: int, context: int) -> list[Document]:
    """Documents that an engine has at work, of which `context` random tokens are remembered and one is to be read."""
    memory, plan, made = engine.memory, engine.plan, []
    for layer in memory.layers:
        for name, std in (("states_SHKK", 0.1), ("k_PLGK", 1.0), ("v_PLGK", 1.0)):
            if hasattr(layer, name):
                getattr(layer, name).normal_(std=std)
    for number in range(documents):
        request = GenerationRequest((1,) * (context + 1), max_tokens=1 << 30, ignore_eod=True)
        document = Document(1 << 20 | number, request, list(request.tokens), None, computed=context)
        document.slot, document.status = memory.running.pop(), Status.RUNNING
        document.pages = array("q", memory.pages.take(plan.pages_of(context + _ROOM)))
        made.append(document)
    engine._scheduler.running += made
    engine._documents |= {document.id: document for document in made}
    return made
