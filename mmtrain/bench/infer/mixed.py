"""A step of documents that get a token each beside short prompts: lightning attention as served, and padded.

MiniMax-01 section 3.3 tells of a batch of 20 with one or two inputs of 50 tokens among single ones: two kernels on two
streams in place of one, with all requests padded to a block, halve its time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmtrain.bench.infer.cases import Mixed
from mmtrain.bench.infer.decode import WARMUP, at_work, step_seconds
from mmtrain.bench.infer.models import ServedModel
from mmtrain.bench.infer.prefill import random_tokens
from mmtrain.bench.timing import Clock
from mmtrain.config import ModelConfig
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.log.kernel_times import profile
from mmtrain.model.linear import Linear
from mmtrain.model.mixers.batch_cache import CacheShape, DocumentBatch
from mmtrain.model.mixers.lightning import LightningAttention, Projections
from mmtrain.model.mixers.lightning_slots import LightningSlots

_CONTEXT = 2**13  # of the documents that get a token
_CALLS = 32  # of a kernel, between two moments: as many layers


def mixed(case: Mixed, served: ServedModel, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Figures of a case: of one layer's attention, of whole steps, and the rows that each projection is called with."""
    return {
        **lightning_core(case, served.model.config, served.model.embed_tokens.weight, wait),
        **whole_steps(case, served, steps, wait),
        "projection_rows": projection_rows(case, served),
    }


def lightning_core(case: Mixed, config: ModelConfig, like: Tensor, wait: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a lightning layer's attention with its SiLU, over these requests.

    *core_ms*: from the first kernel to the last, launched one by one, ours in two streams; *core_kernels_ms*: time of
    the kernels alone. The padded way is the prefill kernel of ours over all requests at `case.padded` tokens each; that
    it has to lay them out so is left out.

    Args:
        case: the requests.
        config: heads.
        like: a weight, for device and dtype.
        wait: lets the host wait for the device.
    """
    device, requests = like.device, case.decodes + case.prompts
    shape = CacheShape(0, 64, requests)
    slots = LightningSlots(config, shape, like.dtype, device)
    slots.states_SHKK.normal_(std=0.1)
    slopes_H = torch.rand(config.num_heads, device=device) / 2

    def attention(first: int, queries: list[int]) -> Callable[[], Tensor]:
        keys, places = [_CONTEXT + count for count in queries], range(first, first + len(queries))
        batch = DocumentBatch.of(queries, keys, places, [()] * len(queries), shape, device)
        qkv_THX = torch.randn(sum(queries), config.num_heads, 3 * config.head_dim, device=device).to(like.dtype)
        view = slots.view(batch)
        return lambda: view.attend(qkv_THX, slopes_H)

    single, prompts = attention(0, [1] * case.decodes), attention(case.decodes, [case.tokens] * case.prompts)
    padded = attention(0, [case.padded] * requests)
    ours = _side_by_side(single, prompts, device)
    found = {}
    for name, call in (("core", ours), ("padded_core", padded)):
        found[f"{name}_ms"] = _span_ms(call, device, wait)
        if device.type == "cuda":
            busy = profile(lambda call=call: [call() for _ in range(_CALLS)]).busy_seconds
            found[f"{name}_kernels_ms"] = busy * 1e3 / _CALLS
    found["core_of_padded"] = found["core_ms"] / found["padded_core_ms"]
    if device.type == "cuda":
        found["core_kernels_of_padded"] = found["core_kernels_ms"] / found["padded_core_kernels_ms"]
    return found


def _side_by_side(first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device) -> Callable[[], Any]:
    """Both, on a GPU in streams of their own that meet afterwards."""
    if device.type != "cuda":
        return lambda: (first(), second())
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def call() -> None:
        current = torch.cuda.current_stream(device)
        for stream, run in zip(streams, (first, second), strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()
        for stream in streams:
            current.wait_stream(stream)

    return call


def _span_ms(call: Callable[[], Any], device: torch.device, wait: Callable[[], None]) -> float:
    """Median milliseconds of a call among as many as a pass has layers, launched without waiting."""
    clock, spans = Clock(device), []
    for _ in range(WARMUP + 5):
        wait()
        begin = clock.mark()
        for _ in range(_CALLS):
            call()
        end = clock.mark()
        wait()
        spans.append(clock.ms(begin, end) / _CALLS)
    return statistics.median(spans[WARMUP:])


def whole_steps(case: Mixed, served: ServedModel, steps: int, wait: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of the engine's steps with the prompts and without, and of the prompts alone."""
    engine = _engine(case, served, None)
    at_work(engine, case.decodes, _CONTEXT)
    found = {"decode_step_ms": statistics.median(step_seconds(engine, steps + WARMUP, wait)[WARMUP:]) * 1e3}
    seconds = []
    for _ in range(steps + WARMUP):
        _submit(case, engine)
        seconds += step_seconds(engine, 1, wait)
    return found | {"mixed_step_ms": statistics.median(seconds[WARMUP:]) * 1e3}


def projection_rows(case: Mixed, served: ServedModel) -> list[int]:
    """Rows of each call of a lightning layer's projections in one mixed step, with their padding.

    Raises:
        AssertionError: layers differ.
    """
    engine = _engine(case, served, None)
    at_work(engine, case.decodes, _CONTEXT)
    engine.step()
    mixers = [layer.mixer for layer in served.model.layers if isinstance(layer.mixer, LightningAttention)]
    rows: list[list[int]] = [[] for _ in mixers]
    before = [mixer.project for mixer in mixers]
    for mixer, seen in zip(mixers, rows, strict=True):
        mixer.project = _noting(mixer.project, seen)
    _submit(case, engine)
    engine.step()
    for mixer, project in zip(mixers, before, strict=True):
        mixer.project = project
    assert all(seen == rows[0] for seen in rows), f"layers differ: {rows}"
    recorded = served.model.embed_tokens.weight.device.type == "cuda"  # a row's first step is run, then recorded
    return rows[0][: len(rows[0]) // 2] if recorded else rows[0]


def _noting(project: Projections, rows: list[int]) -> Projections:
    def noted(qkv_proj: Linear, output_gate: Linear, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(x_TD))
        return project(qkv_proj, output_gate, x_TD)

    return noted


def _engine(case: Mixed, served: ServedModel, graphs: bool | None) -> Engine:
    options = EngineOptions(max_running=case.decodes + case.prompts, prefix_slots=0, cuda_graphs=graphs,
                            longest=_CONTEXT + 256)  # fmt: skip
    return Engine(served.model, options=options)


def _submit(case: Mixed, engine: Engine) -> None:
    """Let the prompts be read in the next step, and end with it."""
    for _ in range(case.prompts):
        engine.submit(GenerationRequest(random_tokens(engine._model.config, case.tokens), max_tokens=1))
