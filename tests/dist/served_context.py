"""Engines over ranks that share keys, and what they give beside an engine of one process.

Functions here run on workers of the pool; everything they return is plain tensors and numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmtrain.config import ClusterConfig
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.context.softmax import ContextPages
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.page_owner import PageOwner
from mmtrain.infer.serving.scheduler import Scheduler
from mmtrain.parallel import mesh
from tests.infer.served import SMALL, assert_nothing_held, request, seen_logits, served_model, state_of, text_of
from tests.model.small import small_model

Script = Callable[[Engine], Any]
"""Something done with an engine, the same on every rank."""


def model_of(name: str) -> nn.Module:
    """A model of the tests of serving, or a hybrid without experts: products of those are not made in float64."""
    return small_model(num_layers=4, layer_pattern="LLS", num_experts=0) if name == "dense" else served_model(name)


@dataclass
class Seen:
    """What an engine gave.

    Attributes:
        made: what its script returned.
        logits: that it sampled from, by all tokens before.
        states: of each request at its end, by its tokens: of each layer the state, or keys and values in order.
        metrics: its counts, as text.
    """

    made: Any
    logits: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    states: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    metrics: str = ""


def whole_state(engine: Engine, document: Document, group: dist.ProcessGroup | None) -> list[Tensor]:
    """As `state_of`, with the keys of all ranks."""
    if group is None:
        return state_of(engine, document.id)
    found = []
    for layer in engine.memory.layers:
        if isinstance(layer, ContextPages):
            found += [_keys(engine, document, pages, group) for pages in (layer.local.k_PLGK, layer.local.v_PLGK)]
        else:
            found.append(layer.local.states_SHKK[document.slot].clone())
    return found


def _keys(engine: Engine, document: Document, pages_PLGK: Tensor, group: dist.ProcessGroup) -> Tensor:
    owner = PageOwner(group.size(), group.rank(), engine.plan.page_tokens)
    here, places = owner.written(document.pages, 0, document.computed)
    whole_SGK = pages_PLGK.new_zeros(document.computed, *pages_PLGK.shape[2:])
    whole_SGK[torch.from_numpy(here)] = pages_PLGK.flatten(0, 1)[torch.from_numpy(places)]
    dist.all_reduce(whole_SGK, group=group)
    return whole_SGK


def watch(engine: Engine, script: Script, group: dist.ProcessGroup | None = None) -> Seen:
    """Run a script, and keep what it shows; at its end the engine holds nothing."""
    states, release = {}, Scheduler.release

    def spy(self: Scheduler, document: Document) -> None:
        if document.slot is not None and document.computed:
            states[tuple(document.tokens[: document.computed])] = whole_state(engine, document, group)
        release(self, document)

    with mock.patch.object(Scheduler, "release", spy), seen_logits() as logits:
        made = script(engine)
    assert_nothing_held(engine)
    return Seen(made, logits, states, repr(engine.metrics))


Scripts = list[tuple[Script, dict[str, Any]]]
"""Each with what its engine's options have beside `SMALL`."""


def on_ranks(name: str, scripts: Scripts, cut_tokens: int, dtype: torch.dtype = torch.float32) -> list[Seen]:
    """Run on every rank: each script with an engine of its own."""
    mesh.start(ClusterConfig(device="cpu"))
    try:
        return watch_all(model_of(name).to(dtype), scripts, ContextParallel(dist.group.WORLD, cut_tokens))
    finally:
        mesh.stop()


def alone(name: str, scripts: Scripts, dtype: torch.dtype = torch.float32) -> list[Seen]:
    """Do the same in this process."""
    return watch_all(model_of(name).to(dtype), scripts, None)


def watch_all(model: nn.Module, scripts: Scripts, context: ContextParallel | None) -> list[Seen]:
    """Run scripts over a model, each with an engine of its own."""
    group = None if context is None else context.group
    return [
        watch(Engine(model, options=replace(SMALL, **changes), context=context), script, group)
        for script, changes in scripts
    ]


def several(engine: Engine) -> Any:
    """Requests of many lengths, more than run at once."""
    made = engine.generate([request(text_of(length), 5, logprobs=True) for length in (37, 1, 12, 50, 2, 5)])
    return [(one.tokens, one.logprobs) for one in made]


def scored(engine: Engine) -> Any:
    """Log-probabilities of texts."""
    return engine.score_all([text_of(length) for length in (30, 1, 2, 17)])


def greedy_tokens(engine: Engine) -> Any:
    """Whether each token of texts is the likeliest, as those are that the engine added itself."""
    texts = [(*text_of(length), *engine.generate([request(text_of(length), 5)])[0].tokens) for length in (20, 3)]
    made = [one.prompt_likeliest for one in engine.read_all(texts)]
    assert all(all(one[-4:]) and not all(one) for one in made)
    return made


def likeliest(engine: Engine) -> Any:
    """Ids of the likeliest tokens in the place of each of a text, and whether its own is the first of them."""
    made = engine.generate([request(text_of(length), 1, prompt_logprobs=True, top_logprobs=3) for length in (30, 5)])
    return [([[token for token, _ in top] for top in one.prompt_top_logprobs], one.prompt_likeliest) for one in made]


def hits(engine: Engine) -> Any:
    """Hits at every boundary of pages and within them; what was kept is written on behind by others."""
    text, made = text_of(21), []
    for boundary in (1, 3, 4, 7, 8, 10, 13, 19):
        first = (*text[:boundary], *text_of(9, seed=boundary))
        before = engine.generate([request(first, 3, keep_prefix=(boundary,))])[0]
        here = engine.generate([request(text, 4), request((*text[:boundary], 5), 4)])
        made.append([(one.tokens, one.prefix_tokens) for one in (before, *here)])
        engine.clear_prefixes()
    return made


def paused(engine: Engine) -> Any:
    """A request that is paused in its prompt and in its continuation, beside another."""
    numbers = [engine.submit(request(text_of(length), 9)) for length in (33, 6)]
    news = []
    for step in range(60):
        if step in (1, 9):
            engine.pause(numbers[0])
        if step in (3, 11):
            engine.resume(numbers[0])
        news += [(one.id, one.token) for one in engine.step()]
    return news


def crowded(engine: Engine) -> Any:
    """Requests that take pages from each other."""
    made = engine.generate([request(text_of(length), 20) for length in (20, 21, 22, 23)])
    assert engine.metrics.preempted or not engine.plan.paged
    return [one.tokens for one in made]


def shuffled(engine: Engine) -> Any:
    """Requests that come, pause, go on and leave at random, over too little memory."""
    rng, unfinished, news = random.Random(1), [], []
    bases = [text_of(40, seed=n) for n in range(3)]
    for _ in range(80):
        if rng.random() < 0.4:
            text = rng.choice(bases)[: rng.randint(1, 40)]
            unfinished.append(
                engine.submit(request(text, rng.randint(1, 24), keep_prefix=(rng.randint(1, len(text)),)))
            )
        if unfinished and rng.random() < 0.3:
            (engine.pause if rng.random() < 0.5 else engine.resume)(rng.choice(unfinished))
        if unfinished and rng.random() < 0.05:
            engine.cancel(unfinished.pop(rng.randrange(len(unfinished))))
        for one in engine.step():
            news.append((one.id, one.token))
            if one.generation is not None:
                unfinished.remove(one.id)
    for number in unfinished:
        engine.cancel(number)
    assert engine.metrics.prefix_hits and engine.metrics.cancelled
    assert engine.metrics.preempted or not engine.plan.paged
    return news


SCRIPTS: Scripts = [
    *((several, dict(prefill_tokens=tokens, max_running=4)) for tokens in (1, 7, 31, 4096)),
    (scored, dict(prefill_tokens=11)),
    (greedy_tokens, dict(prefill_tokens=11)),
    (likeliest, dict(prefill_tokens=11)),
    (hits, dict(prefix_slots=2, prefix_interval=None, prefill_tokens=16)),
    (paused, dict(prefill_tokens=8)),
    (crowded, dict(max_running=4, longest=20)),
]
SHUFFLED: Scripts = [  # over 24 pages, which 2, 3 and 4 ranks share alike
    (shuffled, dict(max_running=4, prefill_tokens=tokens, prefix_slots=2, prefix_interval=8, longest=9))
    for tokens in (3, 64)
]
