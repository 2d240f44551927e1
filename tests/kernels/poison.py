"""Fresh memory that holds NaN: an element that no kernel writes shows in the result."""

from __future__ import annotations

from collections.abc import Callable
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


def fill_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill whatever is allocated with NaN, or integers that are no index: what a kernel leaves unwritten shows."""

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def full(*args: Any, **kwargs: Any) -> torch.Tensor:
            new = make(*args, **kwargs)
            return new.fill_(float("nan") if new.is_floating_point() else 0x33333333 & torch.iinfo(new.dtype).max)

        return full

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
