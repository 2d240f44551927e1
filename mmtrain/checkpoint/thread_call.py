"""One call in a thread of its own, which can be given up, and which no process waits for as it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ThreadCall:
    """A call that is under way from here on.

    Args:
        name: of the thread.
        call: is given this object, and looks at :attr:`is_stopped` where it may end early.
    """

    def __init__(self, name: str, call: Callable[[ThreadCall], object]) -> None:
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name=name, daemon=True)
        self._thread.start()

    @property
    def is_stopped(self) -> bool:
        """Whether nobody wants what the call does any more."""
        return self._stop.is_set()

    def wait(self) -> None:
        """Return when the call has ended.

        Raises:
            BaseException: what it raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def give_up(self) -> None:
        """Ask the call to end early, and return when it has ended; its error is dropped."""
        self._stop.set()
        self._thread.join()

    def _run(self, call: Callable[[ThreadCall], object]) -> None:
        try:
            call(self)
        except BaseException as error:  # raised where it is waited for
            self._error = error
