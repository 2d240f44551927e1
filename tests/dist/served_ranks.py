"""What every rank sees while an engine serves on several: logits, states, and the books of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mmdata.tokenizer import load_tokenizer
from mmtrain.infer.engine import Engine
from mmtrain.infer.layout import RankLayout
from mmtrain.infer.open import open_model
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.generation import Generation, GenerationRequest, Progress
from mmtrain.infer.serving.options import EngineOptions
from tests.infer.served import seen_logits, state_of
from tests.model.small import draw_tokens, small_model

VOCAB = 265  # odd: ranks have different numbers of rows of it; more than the byte tokenizer's 257
SHAPE = dict(vocab_size=VOCAB, ffn_hidden_size=48)
MODELS = {
    "experts": dict(num_layers=4, layer_pattern="LLS", capacity_factor=0.25, **SHAPE),
    "dense": dict(num_layers=3, layer_pattern="LS", num_experts=0, num_kv_heads=1, **SHAPE),
    "pre-norm, shared expert": dict(
        num_layers=2, layer_pattern="LS", post_norm=False, shared_ffn_hidden_size=24, **SHAPE
    ),
}
SMALL = EngineOptions(max_running=8, page_tokens=4, prefill_tokens=64, prefix_slots=0, memory_bytes=1 << 21)
LENGTHS, NEW = (37, 1, 12, 5), 4


@dataclass
class Seen:
    """What one rank saw.

    Attributes:
        logits: from which a token was chosen, by all tokens before.
        states: of each layer, of requests at the moment in which they were cancelled.
        books: after each step free pages, free slots and unfinished requests.
        made: what came out, by way; None on ranks that follow.
        weights: elements of this rank's parameters.
    """

    logits: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    states: list[list[Tensor]] = field(default_factory=list)
    books: list[tuple[int, int, int, int]] = field(default_factory=list)
    made: list[Any] = field(default_factory=list)
    weights: int = 0


def model_of(name: str) -> torch.nn.Module:
    """A model of :data:`MODELS`."""
    return small_model(**MODELS[name])


def ids(length: int, seed: int = 0) -> tuple[int, ...]:
    """Ids of bytes that the seed and length give."""
    return tuple(draw_tokens(length, seed=1000 * seed + length, vocab=256).tolist())


def request(tokens: tuple[int, ...], count: int, **rest: Any) -> GenerationRequest:
    """A greedy request that is as long as it says."""
    return GenerationRequest(tokens, count, ignore_eod=True, **rest)


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Let an engine's logits, its states at a cancellation and its books be seen."""
    step, cancel = Engine.step, Engine.cancel

    def step_seen(self: Engine) -> list[Progress]:
        news = step(self)
        memory = self.memory
        seen.books.append((memory.pages.free, len(memory.running), len(memory.kept), self.unfinished))
        return news

    def cancel_seen(self: Engine, number: int) -> Generation:
        if self._documents[number].slot is not None:
            seen.states.append(state_of(self, number))
        return cancel(self, number)

    with seen_logits() as logits, mock.patch.multiple(Engine, step=step_seen, cancel=cancel_seen):
        yield
    seen.logits.update({row: logits_V.cpu() for row, logits_V in logits.items()})


def batch(engine: Engine) -> list[list[int]]:
    """Requests of all lengths at once."""
    return [one.tokens for one in engine.generate([request(ids(length), NEW) for length in LENGTHS])]


def with_prefix(engine: Engine) -> list[list[int]]:
    """The same prompt three times, from its beginning on when it is known."""
    made = [engine.generate([request(ids(37), NEW, keep_prefix=(18,))])[0] for _ in range(2)]
    engine.clear_prefixes()
    made += engine.generate([request(ids(37), NEW)])
    assert [one.prefix_tokens for one in made] == [0, 18, 0]
    return [one.tokens for one in made]


def preempted(engine: Engine) -> list[list[int]]:
    """Requests that have to give their pages to older ones."""
    made = engine.generate([request(ids(length), 12) for length in (12, 13, 14, 15)])
    assert engine.metrics.preempted > 0 or not engine.plan.paged
    return [one.tokens for one in made]


def paused(engine: Engine) -> list[int]:
    """A request among others that is paused, resumed and cancelled."""
    others = [engine.submit(request(ids(length, seed=9), 30)) for length in (3, 11)]
    mine, tokens = engine.submit(request(ids(21), 30)), []
    while len(tokens) < 6:
        news = [news.token for news in engine.step() if news.id == mine]
        tokens += news
        if news and len(tokens) == 3:
            engine.pause(mine)
            engine.step()
            engine.resume(mine)
    for number in (mine, *others):
        engine.cancel(number)
    engine.generate([request(ids(2), 1)])
    return tokens


def sampled(engine: Engine) -> list[tuple[list[int], list[float], list[float]]]:
    """Sampled tokens, and log-probabilities of prompts."""
    rules = [Sampling(1.0), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.9, repetition_penalty=1.3)]
    requests = [request(ids(9, seed=n), 8, sampling=rule, seed=n, logprobs=True, prompt_logprobs=True)
                for n, rule in enumerate(rules)]  # fmt: skip
    return [(one.tokens, one.logprobs, one.prompt_logprobs) for one in engine.generate(requests)]


WAYS: list[tuple[EngineOptions, Callable[[Engine], Any]]] = [
    (replace(SMALL, prefill_tokens=4096), batch),
    (replace(SMALL, prefill_tokens=7, max_running=3), batch),
    (replace(SMALL, prefill_tokens=1, max_running=3), batch),
    (replace(SMALL, prefix_slots=2, prefill_tokens=13), with_prefix),
    (replace(SMALL, max_running=4, longest=12), preempted),
    (replace(SMALL, prefill_tokens=8), paused),
    (replace(SMALL, prefill_tokens=5), sampled),
    (replace(SMALL, cuda_graphs=True), batch),  # on a CPU: padded as graphs are
]


def serve(
    path: Path, layout: RankLayout, ways: Sequence[int] = range(len(WAYS)), tokenizer: str | None = "bytes",
    device: str = "cpu",
) -> Seen:  # fmt: skip
    """Serve in all ways, on the ranks of a layout."""
    seen = Seen()
    with open_model(path, layout, tokenizer=tokenizer, device=device, verify=False) as opened:
        model = opened.load()
        seen.weights = sum(value.numel() for value in model.parameters())
        with watched(seen):
            seen.made = [opened.run(WAYS[way][0], WAYS[way][1], model) for way in ways]
    return seen


def serve_alone(model: torch.nn.Module, ways: Sequence[int] = range(len(WAYS))) -> Seen:
    """The same by engines of this process."""
    seen = Seen()
    with watched(seen):
        seen.made = [WAYS[way][1](Engine(model, load_tokenizer("bytes"), WAYS[way][0])) for way in ways]
    return seen
