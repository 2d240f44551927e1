"""Share of attention in the time of a prefill, by kind of layer.

MiniMax-01 section 3.3 sets the latency of attention against that of feed-forwards at 1,024,000 tokens: softmax
attention is 95% of both, lightning attention less than 12%. Here a share is that of a kind's layers alone: its mixer
(with projections, gate and norm), or its attention alone (*core*), over mixer and feed-forward. A model of 7:1 is then
reckoned from one layer of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.bench.infer.cases import Shares
from mmtrain.bench.infer.models import ServedModel
from mmtrain.bench.infer.prefill import random_tokens
from mmtrain.bench.timing import Clock
from mmtrain.config import ModelConfig
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.mixers.batch_cache import DocumentBatch

PARTS = ("core", "mixer", "ffn", "layer")
_LINEAR_LAYERS = 7  # to one of softmax attention, in the hybrid that is reckoned
Moment = torch.cuda.Event | float


class Spans:
    """Times between moments on a device, by kind of layer and part; none of them makes the host wait."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self._open: dict[tuple[str, str], Moment] = {}
        self._found: list[tuple[tuple[str, str], Moment, Moment]] = []

    def begin(self, kind: str, part: str) -> None:
        """Note that a part begins."""
        self._open[kind, part] = self.clock.mark()

    def end(self, kind: str, part: str) -> None:
        """Note that it ends."""
        self._found.append(((kind, part), self._open.pop((kind, part)), self.clock.mark()))

    def count(self) -> int:
        """Parts that have ended."""
        return len(self._found)

    def sums(self, count: int) -> dict[tuple[str, str], float]:
        """Milliseconds of the first `count` parts; the device has to have passed them."""
        total: dict[tuple[str, str], float] = {}
        for name, begin, end in self._found[:count]:
            total[name] = total.get(name, 0.0) + self.clock.ms(begin, end)
        return total


class TimedCache:
    """One layer's memory, whose attention is timed; else it is that of the engine."""

    def __init__(self, cache: Any, kind: str, spans: Spans) -> None:
        self._cache, self._kind, self._spans = cache, kind, spans

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def view(self, batch: DocumentBatch) -> TimedBatch:
        """Return the memory of these documents."""
        return TimedBatch(self._cache.view(batch), self._kind, self._spans)


class TimedBatch:
    """A layer's memory of the documents of one pass, whose attention is timed."""

    def __init__(self, batch: Any, kind: str, spans: Spans) -> None:
        self._batch, self._kind, self._spans = batch, kind, spans

    def attend(self, *given: Tensor) -> Tensor:
        """Return the attention of new tokens."""
        self._spans.begin(self._kind, "core")
        o_THK = self._batch.attend(*given)
        self._spans.end(self._kind, "core")
        return o_THK


def shares(case: Shares, served: ServedModel, wait: Callable[[], None]) -> dict[str, Any]:
    """Figures of a case, given the model of :func:`cut_down`: one prefill, with the share up to each of its points."""
    model, longest = served.model, case.points[-1]
    options = EngineOptions(max_running=1, prefix_slots=0, prefill_tokens=case.piece, longest=longest + 64)
    engine, tokens = Engine(model, options=options), random_tokens(model.config, longest)
    engine.generate([GenerationRequest(tokens[: 2 * case.piece + 1], max_tokens=1)])  # compiles, and warms up
    spans, counts = Spans(model.embed_tokens.weight.device), []
    pairs = zip(engine.memory.layers, model.layers, strict=True)
    engine.memory.layers = [TimedCache(cache, layer.spec.name, spans) for cache, layer in pairs]
    with _watched(model, spans):
        engine.submit(GenerationRequest(tokens, max_tokens=1))
        while engine.unfinished:  # a step reads a piece
            engine.step()
            counts.append(spans.count())
    wait()
    until = {point: spans.sums(counts[point // case.piece - 1]) for point in case.points}
    return {
        "context": longest, "piece": case.piece, "layers": model.config.layer_types,
        "points": [{"tokens": point, **shares_of(sums)} for point, sums in until.items()],
    }  # fmt: skip


def cut_down(config: ModelConfig) -> ModelConfig:
    """An architecture's widths with one lightning and one softmax layer."""
    return replace(config, name=f"{config.name}, one layer of each kind", num_layers=2, layer_pattern="LS")


def shares_of(sums: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Milliseconds of each part of a layer by its kind, and shares of them."""
    found: dict[str, Any] = {}
    for kind in sorted({kind for kind, _ in sums}):
        ms = {f"{part}_ms": sums[kind, part] for part in PARTS}
        whole = ms["mixer_ms"] + ms["ffn_ms"]
        found[kind] = ms | {"share": ms["mixer_ms"] / whole, "core_share": ms["core_ms"] / whole}
    if {"lightning", "softmax"} <= set(found):
        many = {"lightning": _LINEAR_LAYERS, "softmax": 1}
        total = sum(many[kind] * found[kind]["layer_ms"] for kind in many)
        found["hybrid"] = {f"{kind}_core_share": many[kind] * found[kind]["core_ms"] / total for kind in many}
    return found


@contextmanager
def _watched(model: nn.Module, spans: Spans) -> Iterator[None]:
    """Time every layer, its mixer and its feed-forward."""
    with ExitStack() as stack:
        for layer in model.layers:
            for part, module in (("layer", layer), ("mixer", layer.mixer), ("ffn", layer.ffn)):
                name = (layer.spec.name, part)
                before = module.register_forward_pre_hook(lambda *_, name=name: spans.begin(*name))
                after = module.register_forward_hook(lambda *_, name=name: spans.end(*name))
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield
