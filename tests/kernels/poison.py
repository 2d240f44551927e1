"""Fresh memory that holds NaN: an element that no kernel writes shows in the result."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch


class _Poisoned:
    """torch, but for what it allocates."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("empty", "empty_like"):
            return found
        return lambda *args, **kwargs: found(*args, **kwargs).fill_(float("nan"))


def poison(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Fill what these modules allocate with NaN."""
    for module in modules:
        monkeypatch.setattr(module, "torch", _Poisoned())
