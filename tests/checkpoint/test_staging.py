"""Which tensors are copied on the device first, and that each copy is of before it changed."""

from __future__ import annotations

import contextlib

import pytest
import torch

from mmtrain.checkpoint import staging
from mmtrain.checkpoint.staging import first_held, held_bytes


@pytest.mark.parametrize(
    ("room", "first"), [(0, 4), (15, 4), (16, 3), (16 + 47, 3), (16 + 48, 2), (16 + 48 + 16, 1), (10**9, 0), (-5, 4)]
)
def test_the_last_ones_that_fit_are_held(room: int, first: int) -> None:
    assert first_held([100, 16, 33, 1], room) == first


def test_each_begins_where_any_dtype_can() -> None:
    assert [held_bytes(size) for size in (0, 1, 16, 17)] == [0, 16, 16, 32]


def test_a_large_one_in_between_ends_the_row() -> None:
    assert first_held([16, 1000, 16], 64) == 2


class NoStream:
    """A stream whose work is done when it is asked for."""

    device = torch.device("cpu")

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> NoStream:
        return self

    def synchronize(self) -> None: ...


class Held:
    """Memory of the host in the place of a device's."""

    def __init__(self, size: int) -> None:
        self.bytes_N: torch.Tensor | None = torch.full((size,), 255, dtype=torch.uint8)

    def free(self) -> None:
        self.bytes_N = None


@pytest.mark.parametrize("room", [0, 700, 1 << 20])
def test_what_is_held_may_change_at_once(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    taken: list[Held] = []

    def take(device: torch.device, size: int) -> Held:
        taken.append(Held(size))
        return taken[-1]

    monkeypatch.setattr(staging, "free_bytes", lambda device: room)
    monkeypatch.setattr(staging, "take", take)
    monkeypatch.setattr(staging, "_PART", 64)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: NoStream())
    shapes = [(33,), (7, 5), (), (0, 3), (100,), (64,)]
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes] + [torch.arange(9, dtype=torch.int8)]
    given[1] = given[1].t()
    copy, wanted = staging.StagingBuffer(torch.device("cpu")), [x.clone() for x in given]
    copy.reserve(sum(x.nbytes for x in given))
    begin, pairs = 0, []
    for x in given:
        pairs.append((x, copy._buffer[begin : begin + x.nbytes].view(x.dtype).view(x.shape)))
        begin += x.nbytes
    copy.tensors = [to for _, to in pairs]
    copy._stream = NoStream()
    copy._start_on_device(pairs)
    for x in given:
        x.add_(1)
    found = copy.finish()
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert len(taken) == (room > 0) and all(one.bytes_N is None for one in taken)
