"""The server of the endpoint: its socket, its signals and its end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator

import uvicorn

from mmtrain.errors import ConfigError, brief
from mmtrain.infer.endpoint.app import Endpoint
from mmtrain.infer.endpoint.engine_thread import EngineThread, SteppedEngine
from mmtrain.infer.endpoint.served import Bounds, Served

ENGINE_FAILED = 1
_LAST = 5  # seconds after the grace in which responses that were cut short are sent


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, before anything is loaded.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError("--host", f"{host} port {port}", f"cannot be served on ({error.strerror})",
                          "give another --port or --host") from None  # fmt: skip
    return bound


class EndpointServer(uvicorn.Server):
    """uvicorn with an end of ours: SIGTERM or Ctrl-C lets requests finish within the grace, and the exit code is 0.

    Args:
        engine: handed to a thread of its own.
        served: the model.
        bounds: limits.
        key: of clients; None lets all in.
    """

    def __init__(self, engine: SteppedEngine, served: Served, bounds: Bounds, key: str | None = None) -> None:
        self._thread = EngineThread(engine, _warn, self._engine_died)
        self._bounds, self._code = bounds, 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: Callable[[], None] = lambda: None
        self.endpoint = Endpoint(self._thread, served, bounds, key)
        super().__init__(uvicorn.Config(
            self.endpoint, http="h11", ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
            server_header=False, timeout_graceful_shutdown=math.ceil(bounds.grace) + _LAST,
        ))  # fmt: skip

    def serve_until_told(self, bound: socket.socket, ready: Callable[[], None] = lambda: None) -> int:
        """Serve on a bound socket until a signal comes or the engine fails; returns the exit code.

        Args:
            bound: of :func:`bind`.
            ready: is called once clients can connect.
        """
        self._ready = ready
        asyncio.run(self._serve_on(bound))
        return self._code

    def end(self) -> None:
        """Take no more requests, and end once those inside have finished, or the grace is over. In the event loop."""
        if self.endpoint.door.closing:  # told again: at once
            self.endpoint.door.empty()
            self.force_exit = True
            return
        self.endpoint.door.closing = self.should_exit = True
        assert self._loop is not None
        self._loop.call_later(self._bounds.grace, self.endpoint.door.empty)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, as uvicorn calls it."""
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would end by the signal itself."""
        yield

    async def _serve_on(self, bound: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread, as in tests
                self._loop.add_signal_handler(number, self.end)
        self._thread.start()
        try:
            await self.serve(sockets=[bound])
        finally:
            await asyncio.to_thread(self._thread.stop)

    def _engine_died(self, error: BaseException) -> None:
        """In the engine's thread."""
        self._code = ENGINE_FAILED
        traceback.print_exception(error)
        print(f"error: the engine failed ({brief(error)}): the server ends", file=sys.stderr, flush=True)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.end)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
