"""Many short requests leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmtrain.infer.endpoint.engine_thread import Job
from mmtrain.infer.endpoint.ticket import Ticket
from tests.infer.endpoint.running import Running, running, wait_for
from tests.infer.served import assert_nothing_held
from tests.model.small import small_model

DESCRIPTORS = Path("/proc/self/fd")


def things() -> dict[str, int]:
    """What requests are made of, by number."""
    gc.collect()
    kinds = (Job, Ticket, asyncio.Queue, asyncio.Task)
    found = {kind.__name__: sum(type(one) is kind for one in gc.get_objects()) for kind in kinds}
    found["descriptors"] = len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.exists() else 0
    return found


def client(server: Running, requests: range) -> int:
    """Ask in turn for answers, streams, refusals and log-probabilities, and go away now and then."""
    for i in requests:
        kind, prompt = i % 10, f"request {i}"
        if kind < 6:
            assert server.complete(prompt=prompt, max_tokens=1)["choices"]
        elif kind == 6:
            assert server.stream(prompt=prompt, max_tokens=2)
        elif kind == 7:
            assert server.refused({"prompt": prompt, "max_tokens": -1})[0] == 400
        elif kind == 8:
            assert server.complete(prompt=prompt, max_tokens=1, echo=True, logprobs=1)["choices"]
        else:
            server.connect(prompt=prompt, max_tokens=2000, ignore_eos=True, stream=bool(i % 20 == 9)).close()
    return len(requests)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_short_requests_leave_nothing_behind(count: int) -> None:
    model = small_model(vocab_size=264, num_layers=2, layer_pattern="LS", hidden_size=16, num_experts=0)
    with running(model) as server:
        client(server, range(20))
        settle(server)
        before = things()
        with ThreadPoolExecutor(8) as clients:
            parts = [range(first, first + count // 8) for first in range(0, count // 8 * 8, count // 8)]
            assert sum(clients.map(lambda part: client(server, part), parts)) >= count - 8
        settle(server)
        after = things()
        # The last request may still have a name in the engine's thread; what leaks does so thousands of times.
        assert {name: number for name, number in after.items() if number > before[name] + 1} == {}
        server.in_engine(lambda: assert_nothing_held(server.engine))
        figures = server.engine.metrics
        assert figures.submitted == figures.finished + figures.cancelled and figures.cancelled >= count // 20
        assert not server.server._thread._jobs and not server.server.endpoint.door._tickets
        assert json.loads(server.ask("GET", "/health")[2]) == {"status": "ok"}


def settle(server: Running) -> None:
    """Wait until the server has let go of all connections."""
    wait_for(lambda: server.inside == 0 and not server.server.server_state.connections)
    wait_for(lambda: not server.server.server_state.tasks)
