"""A dictionary that forgets: for values that can always be made again and of which a few are worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")


def cached(cache: dict[int, _Value], key: int, make: Callable[[int], _Value], keep: int) -> _Value:
    """Value of `cache[key]`, made if need be; the entries made first are dropped, so that at most `keep` are held."""
    if key not in cache:
        while len(cache) >= keep:
            del cache[next(iter(cache))]
        cache[key] = make(key)
    return cache[key]
