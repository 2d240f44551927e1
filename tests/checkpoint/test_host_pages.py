"""Pages of host memory: all are touched, by several threads, and nothing beyond them."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch

from mmtrain.checkpoint import host_pages
from mmtrain.checkpoint.host_pages import map_pages, touch_pages

PAGE = mmap.PAGESIZE


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pages-")]


@pytest.mark.parametrize("cores", [1, 3, 64])
@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 7 * PAGE, 40 * PAGE - 1, 41 * PAGE])
def test_each_page_is_touched_and_nothing_else(monkeypatch: pytest.MonkeyPatch, cores: int, size: int) -> None:
    monkeypatch.setattr(host_pages, "_PART", 2)
    monkeypatch.setattr(host_pages, "_cores", lambda: cores)
    memory = map_pages(size + 3 * PAGE).fill_(255)
    touch_pages(memory[:size])
    wanted = torch.full_like(memory, 255)
    wanted[0:size:PAGE] = 0
    assert torch.equal(memory, wanted) and not ours()


def test_a_page_that_was_touched_is_there() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    memory, before = map_pages(64 << 20), resident()
    touch_pages(memory)
    assert resident() - before >= (60 << 20) // PAGE and not memory.any()


@pytest.mark.parametrize(("cores", "parts", "threads"), [(1, 20, 1), (4, 20, 4), (64, 20, 8), (64, 3, 3)])
def test_no_more_threads_than_eight_cores_and_parts(
    monkeypatch: pytest.MonkeyPatch, cores: int, parts: int, threads: int
) -> None:
    names: list[str] = []

    class Call(host_pages.ThreadCall):
        def __init__(self, name: str, call: object) -> None:
            names.append(name)
            super().__init__(name, call)

    monkeypatch.setattr(host_pages, "_PART", 1)
    monkeypatch.setattr(host_pages, "_cores", lambda: cores)
    monkeypatch.setattr(host_pages, "ThreadCall", Call)
    touch_pages(map_pages(parts * PAGE))
    assert len(names) == threads


@pytest.mark.parametrize("at", [0, 3])
def test_an_error_of_one_thread_is_raised_when_all_have_ended(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    def fill(part: torch.Tensor, value: int) -> torch.Tensor:
        if part.storage_offset() == at * PAGE:
            raise RuntimeError("no such page")
        return part.zero_()

    monkeypatch.setattr(host_pages, "_PART", 1)
    monkeypatch.setattr(host_pages, "_cores", lambda: 2)
    monkeypatch.setattr(torch.Tensor, "fill_", fill)
    with pytest.raises(RuntimeError, match="no such page"):
        touch_pages(map_pages(8 * PAGE))
    assert not ours()


def test_pages_that_nobody_wants_any_more_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "_PART", 1)
    memory = map_pages(8 * PAGE).fill_(255)
    touch_pages(memory, lambda: True)
    assert int(memory.min()) == 255
