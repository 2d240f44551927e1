"""Clients that go away free what their requests hold: waiting, in their prompt, or in their answer."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.infer.endpoint.running import HeldEngine, Running, running, wait_for
from tests.infer.served import SMALL, assert_nothing_held

LONG = dict(prompt="a" * 100, max_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """A server of two slots that reads 8 tokens of prompts a step; its first steps can be given one by one."""
    with running(options=replace(SMALL, max_running=2, prefill_tokens=8)) as made:
        yield made


@pytest.fixture
def held(slow: Running) -> Iterator[tuple[Running, HeldEngine]]:
    """The server, whose engine waits for leave before every step."""
    engine = slow.engine
    assert isinstance(engine, HeldEngine)
    while engine.may_step.acquire(blocking=False):
        pass
    engine.held = True
    try:
        yield slow, engine
    finally:
        engine.release()
    wait_for(lambda: slow.inside == 0)
    slow.in_engine(lambda: assert_nothing_held(engine))


def ended_early(slow: Running, engine: HeldEngine, before: tuple[int, int], requests: int) -> None:
    """Let the engine go on once the door knows that the client has gone: nothing more is made for it."""
    wait_for(lambda: slow.inside == 0)
    engine.release()
    slow.in_engine(lambda: assert_nothing_held(engine))
    assert engine.metrics.cancelled - before[0] == requests
    assert engine.metrics.generated_tokens - before[1] < LONG["max_tokens"]


def counts(engine: HeldEngine) -> tuple[int, int]:
    return engine.metrics.cancelled, engine.metrics.generated_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_in_its_prompt(held: tuple[Running, HeldEngine], stream: bool) -> None:
    slow, engine = held
    before = counts(engine)
    client = slow.connect(**LONG, stream=stream)
    read = engine.metrics.prefill_tokens
    for _ in range(3):
        engine.may_step.release()
    wait_for(lambda: engine.metrics.prefill_tokens == read + 24)
    assert engine.occupancy.pages_used > 0 and engine.occupancy.slots_used == 1
    client.close()
    ended_early(slow, engine, before, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_in_its_answer(held: tuple[Running, HeldEngine], stream: bool) -> None:
    slow, engine = held
    before = counts(engine)
    client = slow.connect(**LONG, n=2, stream=stream)
    while engine.metrics.generated_tokens < before[1] + 5:
        engine.may_step.release()
        wait_for(lambda: engine.may_step._value == 0)
    if stream:
        assert b"HTTP/1.1 200" in client.recv(100)
    client.close()
    ended_early(slow, engine, before, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits(held: tuple[Running, HeldEngine], stream: bool) -> None:
    slow, engine = held
    before = counts(engine)
    first = slow.connect(**{**LONG, "prompt": "a"}, n=2)
    wait_for(lambda: slow.inside == 2)
    second = slow.connect(**LONG, stream=stream)
    wait_for(lambda: slow.inside == 3)
    for _ in range(2):
        engine.may_step.release()
    wait_for(lambda: slow.server._thread.books.occupancy[:2] == (1, 2))
    second.close()
    wait_for(lambda: slow.inside == 2)
    engine.may_step.release(2)  # the one that it was in, and one after its orders
    wait_for(lambda: slow.server._thread.books.occupancy[:2] == (0, 2))
    assert engine.metrics.cancelled - before[0] == 1
    first.close()
    ended_early(slow, engine, before, 3)


def test_with_its_body_half_sent(slow: Running) -> None:
    half = socket.create_connection(("127.0.0.1", slow.port), timeout=60)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    half.sendall(head.encode())
    half.close()
    wait_for(lambda: slow.server.endpoint._answers[499] >= 1)
    assert slow.complete(prompt="a", max_tokens=1)["choices"]


def test_others_are_served_on(slow: Running) -> None:
    fields: dict[str, Any] = dict(prompt="b", max_tokens=6, temperature=0)
    alone = slow.complete(**fields)["choices"]
    clients = [slow.connect(**LONG, stream=bool(i % 2)) for i in range(6)]
    for client in clients:
        client.close()
    assert slow.complete(**fields)["choices"] == alone
    wait_for(lambda: slow.inside == 0)
    slow.in_engine(lambda: assert_nothing_held(slow.engine))
