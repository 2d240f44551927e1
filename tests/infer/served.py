"""Models to serve, texts, and an engine whose logits and states can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from mmtrain.infer.engine import Engine
from mmtrain.infer.joined_projections import join_projections
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.sampler import Choices, Sampler
from mmtrain.model.mixers.batch_cache import DocumentBatch
from mmtrain.model.packed_seq import Packing
from tests.model.small import draw_tokens, small_model

# Capacity of a quarter drops most assignments in training; served, nothing is dropped.
MODELS = {
    "hybrid with experts": dict(num_layers=4, layer_pattern="LLS", capacity_factor=0.25),
    "softmax": dict(num_layers=2, layer_pattern="S", num_experts=0, num_kv_heads=4),
    "lightning": dict(num_layers=2, layer_pattern="L"),
    "pre-norm, shared expert": dict(num_layers=3, layer_pattern="LS", post_norm=False, shared_ffn_hidden_size=24),
}
SMALL = EngineOptions(max_running=8, page_tokens=4, prefill_tokens=64, prefix_slots=0, memory_bytes=1 << 22)


def served_model(name: str = "hybrid with experts") -> nn.Module:
    """A model of :data:`MODELS`, as it is loaded to be served."""
    model = small_model(**MODELS[name])
    join_projections(model)
    return model


def text_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Ids that the seed and length give."""
    return tuple(draw_tokens(length, seed=1000 * seed + length).tolist())


@torch.no_grad()
def full_logits(model: nn.Module, tokens: tuple[int, ...] | list[int]) -> Tensor:
    """Logits [T, V] of the whole forward pass, without a cache."""
    return model.eval()(torch.tensor(tokens), Packing.from_lengths([len(tokens)]))


@torch.no_grad()
def greedy(model: nn.Module, tokens: tuple[int, ...], count: int) -> list[int]:
    """Ids that whole forward passes choose, one after the other."""
    row = list(tokens)
    for _ in range(count):
        row.append(int(full_logits(model, row)[-1].argmax()))
    return row[len(tokens) :]


@contextmanager
def seen_logits(forced: bool = False) -> Iterator[dict[tuple[int, ...], Tensor]]:
    """Collects the logits that an engine samples from, by all tokens before.

    Args:
        forced: let tokens that follow from those before stand in for the chosen ones: two engines whose logits differ
            by rounding may choose others, and then have no more texts in common.
    """
    seen: dict[tuple[int, ...], Tensor] = {}
    choose = Sampler.choose

    def spy(self: Sampler, documents: list[Document], logits_NV: Tensor) -> Choices:
        for document, logits_V in zip(documents, logits_NV, strict=True):
            seen[tuple(document.tokens)] = logits_V.clone()
        chosen = choose(self, documents, logits_NV)
        if not forced:
            return chosen
        follow = [(7 * sum(document.tokens[-3:]) + len(document.tokens)) % 97 for document in documents]
        return Choices(follow, chosen.logprobs, chosen.top)

    with mock.patch.object(Sampler, "choose", spy):
        yield seen


def state_of(engine: Engine, number: int) -> list[Tensor]:
    """What every layer remembers of a running request: the state, or keys and values in order."""
    document = engine._documents[number]
    batch = DocumentBatch.of([1], [document.computed], [document.slot], [document.pages], engine.memory.shape,
                             torch.device("cpu"))  # fmt: skip
    found = []
    for layer in engine.memory.layers:
        if hasattr(layer, "states_SHKK"):
            found.append(layer.states_SHKK[document.slot].clone())
        else:
            found += [pages.flatten(0, 1)[batch.read_S] for pages in (layer.k_PLGK, layer.v_PLGK)]
    return found


def assert_nothing_held(engine: Engine) -> None:
    """All pages and slots are free again, and no request is remembered."""
    engine.clear_prefixes()
    plan = engine.plan
    assert engine.memory.pages.free == plan.pages and not any(engine.memory.pages.owners)
    assert sorted(engine.memory.running) == list(range(plan.running))
    assert sorted(engine.memory.kept) == list(range(plan.running, plan.running + plan.kept))
    assert engine.unfinished == 0


def request(tokens: tuple[int, ...], count: int = 6, **rest: object) -> GenerationRequest:
    """A greedy request."""
    return GenerationRequest(tokens, count, **rest)
