"""What is given back at a boundary between layouts."""

from __future__ import annotations

import pytest
import torch

from mmtrain.train.device import give_back_memory


@pytest.mark.parametrize("public", [True, False], ids=["public name", "torch 2.11"])
def test_memory_pinned_on_the_host_is_given_back_as_the_device_s_is(
    monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    calls: list[str] = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 << 29)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: calls.append("host"), raising=False)
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    if public:
        monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: calls.append("host"), raising=False)
    assert give_back_memory(torch.device("cuda")) == 1.5
    assert calls == ["synchronize", "empty_cache", "host"]


def test_a_cpu_holds_nothing_back() -> None:
    assert give_back_memory(torch.device("cpu")) == 0.0
