"""Prefill of one prompt: its rate beside the training forward pass, its share of the device's peak, and its memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmtrain.bench.infer.cases import Prefill
from mmtrain.bench.infer.models import ServedModel
from mmtrain.config import ModelConfig
from mmtrain.infer.engine import Engine
from mmtrain.infer.planning.plan import plan_serving
from mmtrain.infer.planning.weights import ServingLayout
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.flops import peak_flops, step_flops
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing

_MARKS = 16  # moments of a prefill that are kept and told


def prefill(
    case: Prefill, served: ServedModel, wait: Callable[[], None], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Figures of a prefill case.

    Args:
        case: a prompt.
        served: the model.
        wait: lets the host wait for the device.
        say: is told how far a prompt that is read once has come, as a line.
    """
    model, options = served.model, EngineOptions(
        max_running=1, prefix_slots=0, prefill_tokens=case.piece, longest=case.tokens + 64)  # fmt: skip
    engine, tokens = Engine(model, options=options), random_tokens(model.config, case.tokens)
    read_prompt(engine, tokens[: 2 * case.piece + 1] if case.once else tokens, wait)
    beside = StepMemory(model.embed_tokens.weight.device)
    marks = read_prompt(engine, tokens, wait, say if case.once else None)
    memory = beside.of_plan(step_memory_planned(model.config, case, options))
    seconds = marks[-1][1]
    found: dict[str, Any] = {"context": case.tokens, "piece": case.piece, "seconds": seconds,
                             "tokens_s": case.tokens / seconds, **memory}  # fmt: skip
    flops = prefill_flops(model.config, case.tokens)
    found["tflop_s"] = flops / seconds / 1e12
    if peak := _peak(model):
        found["mfu"] = flops / seconds / peak
    del engine
    gc.collect()
    if case.once:
        return found | {"marks": marks}
    try:
        found["forward_tokens_s"] = case.tokens / forward_seconds(model, tokens, wait)
        found["of_forward"] = found["tokens_s"] / found["forward_tokens_s"]
    except torch.OutOfMemoryError:
        found["forward_tokens_s"] = "does not fit"
    return found


class StepMemory:
    """What steps take of a GPU from here on, beside what is held now."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu, self._held = device, device.type == "cuda", 0
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            self._held = torch.cuda.memory_allocated(device)

    def of_plan(self, planned: int) -> dict[str, float]:
        """Bytes at most, bytes planned and their ratio; nothing on a CPU, which counts no memory."""
        if not self._on_gpu:
            return {}
        taken = torch.cuda.max_memory_allocated(self._device) - self._held
        return {"step_bytes": taken, "step_bytes_planned": planned, "step_of_plan": taken / planned}


def step_memory_planned(config: ModelConfig, case: Prefill, options: EngineOptions) -> int:
    """Bytes that `mmtrain.infer.planning` reckons for a step of a prompt, with the copy of a layer's keys."""
    plan = plan_serving(config, ServingLayout(), case.precision, case.tokens + 1, 1 << 40, options)
    return plan.step_bytes + plan.copies_bytes


def random_tokens(config: ModelConfig, count: int) -> tuple[int, ...]:
    """So many ids at random."""
    return tuple(torch.randint(config.vocab_size, (count,)).tolist())


def read_prompt(
    engine: Engine, tokens: Sequence[int], wait: Callable[[], None], say: Callable[[str], None] | None = None
) -> list[tuple[int, float]]:
    """Read a prompt and choose the next token; tokens that have been read and seconds so far, at some moments.

    The host waits for the device at these moments alone: 16 in a long prompt, one in a short one.
    """
    wait()
    began, marks = time.perf_counter(), []
    number = engine.submit(GenerationRequest(tuple(tokens), max_tokens=1))
    document = engine._documents[number]
    every = max(1, len(tokens) // _MARKS)
    while engine.unfinished:
        engine.step()
        if say is not None and document.computed // every > len(marks) and engine.unfinished:
            wait()
            marks.append((document.computed, time.perf_counter() - began))
            say(f"{marks[-1][0]:,} of {len(tokens):,} tokens after {marks[-1][1]:.1f} s")
    wait()
    return [*marks, (len(tokens), time.perf_counter() - began)]


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Useful operations of a prompt's prefill: those of the forward pass, with the head for the last token alone."""
    count = step_flops(config, [tokens])
    return count.forward - count.by_part["head"] * (1 - 1 / tokens)


@torch.no_grad()
def forward_seconds(model: HybridLM, tokens: Sequence[int], wait: Callable[[], None]) -> float:
    """Seconds of the training forward pass over a row of one document, without head and loss, the second time."""
    device = model.embed_tokens.weight.device
    tokens_T, packing = torch.tensor(tokens, device=device), Packing.from_lengths([len(tokens)], device)
    for _ in range(2):
        wait()
        began = time.perf_counter()
        model.final_states(tokens_T, packing)
        wait()
    return time.perf_counter() - began


def _peak(model: HybridLM) -> float | None:
    device = model.embed_tokens.weight.device
    return peak_flops(torch.cuda.get_device_name(device), "bf16") if device.type == "cuda" else None
