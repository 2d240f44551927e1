"""Responses whose work ends when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from starlette.types import Receive, Send

T = TypeVar("T")


class ClientGone(Exception):
    """End of a request whose client has closed the connection."""


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """Return what `work` gives; it is cancelled as soon as the client closes the connection.

    Args:
        receive: of the request, whose body has been read.
        work: to do.

    Raises:
        ClientGone: the client closed the connection first.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def send_events(send: Send, events: AsyncGenerator[bytes]) -> None:
    """Send a response of server-sent events, each as soon as it is there."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with contextlib.aclosing(events):
        async for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    message: dict[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = dict(await receive())
