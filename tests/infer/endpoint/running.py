"""An endpoint on a real socket in this process, its clients, and an engine that can be held between two steps."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from mmdata.tokenizer import ByteTokenizer, Tokenizer
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.generation import Progress
from mmtrain.model.model import HybridLM
from tests.infer.served import SMALL
from tests.model.small import small_model

T = TypeVar("T")
PATIENCE = 120.0  # seconds after which a test gives up; none of them waits for it


def byte_model() -> HybridLM:
    """A model over bytes, at random, so that its text is full of broken characters."""
    return small_model(vocab_size=264, num_layers=3, layer_pattern="LLS", hidden_size=32)


class HeldEngine(Engine):
    """Engine whose steps wait for leave while it is held."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.may_step = threading.Semaphore(0)
        self.held, self.begun = False, 0  # steps begun
        self.steppers: set[int] = set()  # threads that have stepped it

    def step(self) -> list[Progress]:
        self.begun += 1
        if self.held:
            assert self.may_step.acquire(timeout=PATIENCE)
        self.steppers.add(threading.get_ident())
        return super().step()

    def release(self) -> None:
        """Let it go on for good."""
        self.held = False
        self.may_step.release()


class Running:
    """A server and its clients."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, bounds: Any, key: str | None, chat: Any) -> None:
        from mmtrain.infer.endpoint.command import LONGEST
        from mmtrain.infer.endpoint.served import Served
        from mmtrain.infer.endpoint.server import EndpointServer, bind

        self.engine = engine
        length = min(bounds.length or LONGEST, engine.plan.longest or LONGEST)
        self.served = Served("tiny", tokenizer, length, engine.plan.running + bounds.waiting, 7, chat)
        self.server = EndpointServer(engine, self.served, bounds, key)
        bound = bind("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self.code: int | None = None
        self._thread = threading.Thread(target=self._serve, args=(bound,))
        self._thread.start()
        wait_for(lambda: self.server.started or not self._thread.is_alive())

    def _serve(self, bound: socket.socket) -> None:
        self.code = self.server.serve_until_told(bound)

    def stop(self) -> None:
        """Tell it to end, and wait for that."""
        if self._thread.is_alive() and not self.server.endpoint.door.closing:
            self.server._loop.call_soon_threadsafe(self.server.end)
        self.join()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def ask(self, method: str, path: str, data: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            kind = {"Content-Type": "application/json"} if data else {}
            connection.request(method, path, data, {**kind, **headers})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def complete(self, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
        """The answer to a completion; it must be one."""
        status, _, body = self.ask("POST", path, json.dumps(fields).encode())
        assert status == 200, body
        return json.loads(body)

    def refused(self, data: bytes | dict[str, Any], path: str = "/v1/completions") -> tuple[int, dict[str, Any]]:
        """Status and error of a request that must not be answered."""
        status, _, body = self.ask("POST", path, data if isinstance(data, bytes) else json.dumps(data).encode())
        return status, json.loads(body)["error"]

    def stream(self, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, whose last must be [DONE]."""
        status, headers, body = self.ask("POST", path, json.dumps({**fields, "stream": True}).encode())
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), body
        events = body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def connect(self, **fields: Any) -> socket.socket:
        """A connection whose request has been sent; closing it is to go away."""
        data = json.dumps(fields).encode()
        made = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        made.sendall(head.encode() + b"\r\n\r\n" + data)
        return made

    def in_engine(self, order: Callable[[], T]) -> T:
        """What a function gives that the engine's thread calls between two steps."""
        found: Future[T] = Future()

        def carry_out() -> None:
            try:
                found.set_result(order())
            except BaseException as error:
                found.set_exception(error)

        self.server._thread.ask(carry_out)
        return found.result(PATIENCE)

    @property
    def inside(self) -> int:
        """Continuations that the door has let in and not out."""
        return self.server.endpoint.door.inside


@contextmanager
def running(
    model: HybridLM | None = None, options: Any = SMALL, tokenizer: Tokenizer | None = None, key: str | None = None,
    chat: Any = None, **bounds: Any,
) -> Iterator[Running]:  # fmt: skip
    """Serves a model of bytes; afterwards it is ended, and must have given everything back."""
    pytest.importorskip("starlette", reason='the endpoint needs pip install "mmtrain[serve]"')
    pytest.importorskip("uvicorn", reason='the endpoint needs pip install "mmtrain[serve]"')
    from mmtrain.infer.endpoint.served import Bounds

    tokenizer = tokenizer or ByteTokenizer()
    engine = HeldEngine(byte_model() if model is None else model, tokenizer, options, lambda line: None)
    made = Running(engine, tokenizer, Bounds(**{"grace": 60.0, **bounds}), key, chat)
    try:
        yield made
    finally:
        engine.release()
        made.stop()


def wait_for(true: Callable[[], bool]) -> None:
    """Return once something has become true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.002)
