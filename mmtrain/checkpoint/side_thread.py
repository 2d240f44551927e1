"""A thread for one call at a time beside the thread that makes it: hashing and syncing while the next part is written.

No thread pool of Python's library: that one has a process wait for its calls as it ends, and a disk may hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType


class SideThread:
    """A thread within a `with` block, at whose end no call is under way any more.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> SideThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for the last call, and raise its error unless another one is on its way."""
        self._calls.put(None)
        self._thread.join()
        if error is None:
            self.wait()

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        return not self._idle.is_set()

    def start(self, call: Callable[[], object]) -> None:
        """Make a call once the one before has ended.

        Raises:
            Exception: what the one before raised.
        """
        self.wait()
        self._idle.clear()
        self._calls.put(call)

    def wait(self) -> None:
        """Return when no call is under way.

        Raises:
            Exception: what the last one raised.
        """
        self._idle.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # raised where the next call is made
                self._error = error
            del call
            self._idle.set()
