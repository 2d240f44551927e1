"""Decode steps that are not planned anew are those that would have been planned."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest

from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.scheduler import Scheduler, Step
from mmtrain.infer.serving.standing import Standing
from tests.infer.served import SMALL, request, served_model, text_of

Planned = list[tuple[int, int, int, list[int]]]
HOLDS, SCHEDULE = Standing.holds, Scheduler.schedule


def steps_of(engine: Engine, seed: int, holds: Callable[[Standing, list[Document]], bool]) -> list[Planned]:
    """Serve requests that come and go at random; returns the documents, tokens, slots and pages of every step."""
    steps: list[Planned] = []

    def note(self: Scheduler) -> Step:
        step = SCHEDULE(self)
        steps.append([(one.id, count, one.slot, list(one.pages)) for one, count in (*step.prefill, *step.decode)])
        return step

    draw = random.Random(seed)
    with mock.patch.object(Scheduler, "schedule", note), mock.patch.object(Standing, "holds", holds):
        unfinished: list[int] = []
        for _ in range(200):
            if len(unfinished) < 8 and draw.random() < 0.1:
                unfinished.append(engine.submit(request(text_of(draw.randint(1, 12)), draw.randint(1, 40))))
            if unfinished and draw.random() < 0.2:
                change = draw.choice((engine.pause, engine.resume, engine.resume, engine.cancel))
                change(draw.choice(unfinished))
            engine.step()
            unfinished = [number for number in unfinished if number in engine._documents]
    return steps


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax", replace(SMALL, memory_bytes=1 << 17)),  # 32 pages
        ("softmax", replace(SMALL, memory_bytes=1 << 17, prefix_slots=2, prefix_interval=4, prefill_tokens=3)),
        ("lightning", SMALL),
        ("hybrid with experts", replace(SMALL, max_running=3)),
    ],
)
def test_steps_are_those_that_are_planned_one_by_one(name: str, options: object) -> None:
    model, held = served_model(name), []

    def note(self: Standing, running: list[Document]) -> bool:
        held.append(HOLDS(self, running))
        return held[-1]

    for seed in range(3):
        stood = steps_of(Engine(model, options=options), seed, note)
        assert stood == steps_of(Engine(model, options=options), seed, lambda self, running: False)
    assert sum(held) > 100 and not all(held)


def test_one_who_leaves_and_comes_again_at_once_is_planned_anew() -> None:
    engine = Engine(served_model(), options=replace(SMALL, prefix_slots=2, prefix_interval=4))
    number = engine.submit(request(text_of(4), 20))
    for _ in range(3):
        engine.step()
    document = engine._documents[number]
    assert engine._scheduler._standing.holds([document])
    engine.pause(number)
    assert not engine._scheduler._standing.holds([document])
    engine.resume(number)
    engine.step()
    assert document.computed == len(document.tokens) - 1 and document.slot is not None


def test_a_step_that_its_caller_changes_does_not_change_the_next() -> None:
    engine = Engine(served_model(), options=SMALL)
    engine.submit(request(text_of(5), 20))
    for _ in range(2):
        engine.step()
    engine._scheduler.schedule().decode.clear()
    assert len(engine._scheduler.schedule().decode) == 1


def test_documents_that_have_ended_are_let_go() -> None:
    engine = Engine(served_model(), options=replace(SMALL, cuda_graphs=True))
    number = engine.submit(request(text_of(5), 4))
    document = weakref.ref(engine._documents[number])
    while engine.at_work:
        engine.step()
    gc.collect()
    assert document() is None
