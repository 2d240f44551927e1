"""Tickets: the asyncio side of jobs, and how many of them are let in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

from mmtrain.infer.endpoint.engine_thread import EngineThread, Event, Job
from mmtrain.infer.endpoint.refusal import Refusal
from mmtrain.infer.serving.generation import Generation, GenerationRequest, Progress


class Ticket:
    """Requests of one client, from their submission to their end; made and used in one event loop.

    Args:
        thread: of the engine.
        requests: of the engine.
    """

    def __init__(self, thread: EngineThread, requests: Sequence[GenerationRequest]) -> None:
        self.count = len(requests)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._thread, self._job, self._unfinished = thread, Job(requests, self._deliver), len(requests)

    def submit(self) -> None:
        """Let the requests wait for the engine."""
        self._thread.submit(self._job)

    async def news(self) -> AsyncIterator[tuple[int, Progress]]:
        """Yield the index and the news of each request, until all have ended.

        Raises:
            Refusal: the engine failed, or the server ends.
        """
        while self._unfinished:
            event = await self._events.get()
            if event.failure is not None:
                self._unfinished = 0
                raise event.failure
            assert event.news is not None
            self._unfinished -= event.news.generation is not None
            yield event.index, event.news

    async def generations(self) -> list[Generation]:
        """Return what the requests made, in their order, once all have ended.

        Raises:
            Refusal: as :meth:`news`.
        """
        made = {index: news.generation async for index, news in self.news() if news.generation is not None}
        return [made[index] for index in range(self.count)]

    def fail(self, failure: Refusal) -> None:
        """End it with an error."""
        self._events.put_nowait(Event(0, None, failure))
        self._thread.cancel(self._job)

    def close(self) -> None:
        """Free what is unfinished."""
        if self._unfinished:
            self._thread.cancel(self._job)

    def _deliver(self, events: list[Event]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(lambda: [self._events.put_nowait(event) for event in events])


class Door:
    """Admission of tickets, within a bound on continuations that are unfinished.

    Attributes:
        inside: unfinished continuations.
        closing: whether the server is to stop: nobody is let in any more.

    Args:
        thread: of the engine.
        most: continuations that may be inside.
    """

    def __init__(self, thread: EngineThread, most: int) -> None:
        self._thread, self._most = thread, most
        self._tickets: set[Ticket] = set()
        self.inside, self.closing = 0, False

    @contextlib.contextmanager
    def ticket(self, requests: Sequence[GenerationRequest]) -> Iterator[Ticket]:
        """Submit requests; those that are unfinished at the end of the block are cancelled.

        Raises:
            Refusal: there is no room, or the server is shutting down.
        """
        if self.closing:
            raise Refusal(503, "the server is shutting down", code="shutting_down")
        if self.inside + len(requests) > self._most:
            message = f"{self.inside:,} continuations are at work or wait, {self._most:,} may; try again later"
            raise Refusal(429, message, code="queue_full", headers={"Retry-After": "1"})
        ticket = Ticket(self._thread, requests)
        self._tickets.add(ticket)
        self.inside += ticket.count
        try:
            ticket.submit()
            yield ticket
        finally:
            ticket.close()
            self.inside -= ticket.count
            self._tickets.discard(ticket)

    def empty(self) -> None:
        """End all tickets with the word that the server is shutting down."""
        for ticket in list(self._tickets):
            ticket.fail(Refusal(503, "the server is shutting down", code="shutting_down"))
