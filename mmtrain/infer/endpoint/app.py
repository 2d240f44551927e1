"""The routes of the endpoint, as a Starlette application."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from mmtrain.infer.endpoint.answer import Answer
from mmtrain.infer.endpoint.body import Asked, chat, completion
from mmtrain.infer.endpoint.engine_thread import EngineThread
from mmtrain.infer.endpoint.fields import Fields, parse_body
from mmtrain.infer.endpoint.prometheus import TYPE, figures
from mmtrain.infer.endpoint.refusal import Refusal
from mmtrain.infer.endpoint.served import Bounds, Served
from mmtrain.infer.endpoint.ticket import Door
from mmtrain.infer.endpoint.watched import ClientGone, send_events, while_there

_GONE = 499  # in the figures; as nginx counts clients that went away
Reader = Callable[[Fields, Served], Asked]


class Endpoint:
    """ASGI application that answers OpenAI's requests from an engine.

    Attributes:
        door: lets requests in.

    Args:
        thread: of the engine, which is not started here.
        served: the model.
        bounds: limits.
        key: what clients must send as a bearer token; None lets all in.
    """

    def __init__(self, thread: EngineThread, served: Served, bounds: Bounds, key: str | None = None) -> None:
        self.door = Door(thread, served.choices)
        self._thread, self._served, self._bounds, self._key = thread, served, bounds, key
        self._answers: Counter[int] = Counter()
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/completions", _Answering(self, completion), methods=["POST"]),
            Route("/v1/chat/completions", _Answering(self, chat), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _bug}
        self._app = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every response is counted."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answers[message["status"]] += 1
            await send(message)

        if scope["type"] == "http" and scope["path"] != "/health" and not self._may_enter(Request(scope)):
            refusal = Refusal(401, "Authorization: Bearer KEY is missing, or has another key than the server's",
                              code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
            await _refused(refusal)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    async def answer(self, request: Request, read: Reader, send: Send) -> None:
        """Answer a completion of either kind."""
        try:
            data = await _body(request, self._bounds.body_bytes)
            # Texts of megabytes take seconds to encode; the event loop serves others meanwhile.
            asked = await asyncio.to_thread(lambda: read(parse_body(data), self._served))
            answer = Answer(asked, self._served, int(time.time()))
            with self.door.ticket(asked.requests) as ticket:
                if asked.stream:
                    await while_there(request.receive, send_events(send, answer.stream(ticket)))
                    return
                made = await while_there(request.receive, ticket.generations())
            response: Response = JSONResponse(await asyncio.to_thread(answer.whole, made))
        except Refusal as refusal:
            response = _refused(refusal)
        except (ClientGone, ClientDisconnect):
            self._answers[_GONE] += 1
            return
        await response(request.scope, request.receive, send)

    def _may_enter(self, request: Request) -> bool:
        given = request.headers.get("authorization", "")
        return self._key is None or hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode())

    async def _health(self, request: Request) -> Response:
        closing = self.door.closing
        return JSONResponse({"status": "shutting down" if closing else "ok"}, 503 if closing else 200)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(figures(self._thread.books, self._answers, self.door.inside), media_type=TYPE)

    async def _models(self, request: Request) -> Response:
        served = self._served
        model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "mmtrain",
                 "max_model_len": served.length}  # fmt: skip
        return JSONResponse({"object": "list", "data": [model]})


class _Answering:
    """Route that reads bodies of one kind; an ASGI application, so that it sees the client go away."""

    def __init__(self, endpoint: Endpoint, read: Reader) -> None:
        self._endpoint, self._read = endpoint, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint.answer(Request(scope, receive), self._read, send)


async def _body(request: Request, most: int) -> bytes:
    """Bytes of a body, read no further than the limit.

    Raises:
        Refusal: it is longer, or of another type.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "the body must be JSON, not compressed: send Content-Type: application/json",
                      code="unsupported_media_type")  # fmt: skip
    # The rest of a body that is too long is not read: the connection ends.
    too_long = Refusal(413, f"the body is longer than {most:,} bytes", code="body_too_long",
                       headers={"Connection": "close"})  # fmt: skip
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_long
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise too_long
    return bytes(data)


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


def _bug(request: Request, error: Exception) -> Response:
    """An error of ours, whose traceback goes to standard error."""
    return _refused(Refusal(500, "the server failed on this request; its standard error says how", code="internal"))


def _http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own: a path or a method that is not served."""
    path = request.url.path[:100]
    known = {404: f"{path} is not served; /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics are",
             405: f"{path} does not take {request.method}"}  # fmt: skip
    refusal = Refusal(error.status_code, known.get(error.status_code, error.detail), headers=dict(error.headers or {}))
    return _refused(refusal)
