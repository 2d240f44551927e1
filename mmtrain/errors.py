"""The one error a user's input can raise."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work, in one line: which option, its value, what is allowed and the fix.

    Raised before any process group, device memory or file is touched.
    """

    def __init__(self, option: str, value: Any, problem: str, fix: str) -> None:
        self.option, self.value, self.problem, self.fix = option, value, problem, fix
        super().__init__(f"{option}={value}: {problem}; {fix}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known name, or the list of known names.

    Args:
        name: what was given.
        known: the allowed names.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(names)
