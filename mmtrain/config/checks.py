"""The two checks that most options need."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mmtrain.errors import ConfigError, nearest


def choose(option: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a value that is none of `allowed`, naming the nearest (ConfigError)."""
    if value in allowed:
        return
    off = "off" in allowed and value.lower() in ("false", "no", "none", "null", "0", "disabled")
    raise ConfigError(option, value, "not a known choice", "did you mean 'off'?" if off else nearest(value, allowed))


def require(ok: bool, option: str, value: Any, problem: str, fix: str) -> None:
    """Refuse an option's value unless `ok`, saying what is wrong and how to mend it (ConfigError)."""
    if not ok:
        raise ConfigError(option, value, problem, fix)
