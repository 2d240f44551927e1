"""A dictionary that forgets: for things that are cheap to keep a few of and can always be made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")


def cached(cache: dict[int, _Value], key: int, make: Callable[[int], _Value], keep: int) -> _Value:
    """`cache[key]`, made if need be; the entries made first go, so that at most `keep` are held."""
    if key not in cache:
        while len(cache) >= keep:
            del cache[next(iter(cache))]
        cache[key] = make(key)
    return cache[key]
