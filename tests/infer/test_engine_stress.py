"""Requests that come, pause, go on and leave at random over too little memory: the books hold after every step."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.document import Status
from mmtrain.infer.serving.generation import Generation
from tests.infer.served import SMALL, assert_nothing_held, greedy, request, served_model, text_of


def check_books(engine: Engine) -> None:
    """Every page has the owners that hold it, every slot one; documents have the pages of what they computed."""
    memory, scheduler = engine.memory, engine._scheduler
    owners: Counter[int] = Counter()
    for document in scheduler.running:
        assert document.status == Status.RUNNING and len(set(document.pages)) == len(document.pages)
        assert len(document.pages) >= memory.plan.pages_of(document.computed)
        owners.update(document.pages)
    for prefix in scheduler.prefixes._kept.values():
        owners.update(prefix.pages)
    assert memory.pages.owners == [owners[page] for page in range(memory.plan.pages)]
    assert memory.pages.free == sum(owners[page] == 0 for page in range(memory.plan.pages))
    slots = [*memory.running, *(document.slot for document in scheduler.running)]
    assert sorted(slots) == list(range(memory.plan.running))
    assert len(memory.kept) + len(scheduler.prefixes) == memory.plan.kept


@pytest.mark.parametrize("seed", [0, pytest.param(range(1, 20), marks=pytest.mark.slow)])
def test_the_books_hold_and_results_are_right(seed: int | range) -> None:
    model = served_model()
    bases = [text_of(40, seed=n) for n in range(3)]
    for number in seed if isinstance(seed, range) else [seed]:
        rng = random.Random(number)
        options = replace(SMALL, max_running=4, prefill_tokens=rng.choice([3, 9, 64]), prefix_slots=2,
                          prefix_interval=8, longest=5)  # fmt: skip
        engine = Engine(model, options=options)
        assert engine.plan.longest == 72  # at most four documents of up to 64
        unfinished, asked, done = [], {}, {}
        for _ in range(80):
            if rng.random() < 0.4:
                text = rng.choice(bases)[: rng.randint(1, 40)]
                one = engine.submit(request(text, rng.randint(1, 24), keep_prefix=(rng.randint(1, len(text)),)))
                asked[one] = text
                unfinished.append(one)
            if unfinished and rng.random() < 0.3:
                one = rng.choice(unfinished)
                (engine.pause if rng.random() < 0.5 else engine.resume)(one)
            if unfinished and rng.random() < 0.05:
                one = unfinished.pop(rng.randrange(len(unfinished)))
                done[one] = engine.cancel(one)
            _step(engine, unfinished, done)
        for one in unfinished:
            engine.resume(one)
        while unfinished:
            _step(engine, unfinished, done)
        for one, made in done.items():
            assert made.tokens == greedy(model, asked[one], len(made.tokens))
        assert engine.metrics.preempted and engine.metrics.prefix_hits and engine.metrics.cancelled
        assert_nothing_held(engine)


def _step(engine: Engine, unfinished: list[int], done: dict[int, Generation]) -> None:
    for news in engine.step():
        if news.generation is not None:
            unfinished.remove(news.id)
            done[news.id] = news.generation
    check_books(engine)
