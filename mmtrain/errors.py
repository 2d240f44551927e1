"""Errors that a user is told in one line: a wrong input, a lost rank, a run that was stopped, a device that is full."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(ValueError):
    """A mistake in what a user gave: programs tell it in one line, without a traceback, and exit with code 2.

    Packages below mmtrain work without it and cannot inherit from this class. Their errors of the same meaning
    (mmdata's DataError, mmkernels' KernelArgumentError) carry the same attribute; :func:`is_user_error` knows both.
    """

    is_user_error = True


class ConfigError(UserError):
    """A setting that cannot work, in one line: which option, its value, what is allowed and the fix.

    Raised before any process group, device memory or file is touched.
    """

    def __init__(self, option: str, value: Any, problem: str, fix: str) -> None:
        self.option, self.value, self.problem, self.fix = option, value, problem, fix
        super().__init__(f"{option}={value}: {problem}; {fix}")


class RankLost(RuntimeError):
    """Loss of another rank, which died, hangs or stopped on an error: which one, since when, and what to do.

    Raised during a run: this rank cannot go on without the other. Nothing is wrong with the configuration, and the run
    can be resumed.
    """

    EXIT_CODE = 3
    exit_code = EXIT_CODE

    def tell(self) -> None:
        """Print the message on stderr, with the error of this rank that it explains."""
        lines = [f"error on rank {os.environ.get('RANK', '0')}: {self}"]
        if self.__cause__ is not None:
            lines.append(f"  it came to light here as {brief(self.__cause__)}")
        print("\n".join(lines), file=sys.stderr, flush=True)


class RunStopped(Exception):
    """End of a run before its plan is done, for a reason that all ranks share: which, at which step, and what to do.

    Args:
        message: the reason and the way on, one line.
        exit_code: of the process; NOT_FINITE, FAULTY_DEVICE, or 128 and the number of the signal that asked.
    """

    NOT_FINITE = 4
    FAULTY_DEVICE = 6

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self._told = False

    def tell(self) -> None:
        """Print the message on stderr, once and on one rank: it is the same on all."""
        if os.environ.get("RANK", "0") == "0" and not self._told:
            print(self, file=sys.stderr, flush=True)
        self._told = True


class OutOfDeviceMemory(UserError):
    """Lack of memory on this rank's device: how much was held and predicted, and which options save most.

    The other ranks end as they do for any rank that stops on an error.

    Args:
        message: one line.
        lines: the prediction of all phases, and advice.
    """

    EXIT_CODE = 5
    exit_code = EXIT_CODE

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = lines

    def tell(self) -> None:
        """Print message and lines on stderr, on every rank that it happens on."""
        text = "\n".join([f"error on rank {os.environ.get('RANK', '0')}: {self}", *self.lines])
        print(text, file=sys.stderr, flush=True)


def is_user_error(error: BaseException) -> bool:
    """Tell a user's mistake, of whatever package, from a bug: it carries the attribute ``is_user_error``."""
    return getattr(error, "is_user_error", False) is True


def brief(error: BaseException) -> str:
    """Return type and first line of an error, 200 characters at most."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known name, or the list of known names.

    Args:
        name: what was given.
        known: the allowed names.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(names)
