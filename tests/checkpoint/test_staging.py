"""Which tensors are copied on the device first, and that each copy is of before it changed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

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


def test_the_steps_wait_for_the_thread_that_writes_only_where_it_copies() -> None:
    given = [torch.randn(5), torch.randn(1 << 15)]
    for source, now, waits in ((given[0], False, False), (given[1], True, False), (given[1], False, True)):
        copy = staging.StagingBuffer(torch.device("cpu"))
        for _ in range(2):  # what the first copy ended does not count for the second
            copy.start([source], [now])
            changes = threading.Thread(target=copy.wait, daemon=True)
            changes.start()
            changes.join(0.2 if waits else 60)
            assert changes.is_alive() == waits
            assert torch.equal(copy.finish()[0], source)
            changes.join(60)
            assert not changes.is_alive()


class Runtime:
    """Stands for CUDA's runtime: what is pinned, on which device and thread, and how many pages it found there."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.calls: list[tuple[str, int, str]] = []
        self.device = threading.local()
        self.go, self.result = threading.Event(), 0
        self.go.set()

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        self.device.name = str(device)
        yield
        del self.device.name

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert self.device.name == "cuda:1" and self.touched == [size]
        self.go.wait()
        self.calls.append(("pin", size, threading.current_thread().name))
        if self.result == 0:
            self.pinned[pointer] = size
        return self.result

    def cudaHostUnregister(self, pointer: int) -> int:
        self.calls.append(("unpin", self.pinned.pop(pointer), threading.current_thread().name))
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    touch = staging.touch_pages

    def touched(memory_N: torch.Tensor, is_stopped: Callable[[], bool]) -> None:
        fake.touched = [memory_N.numel()]
        touch(memory_N, is_stopped)

    monkeypatch.setattr(staging, "touch_pages", touched)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", fake.on)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    return fake


def pinned_copy() -> staging.StagingBuffer:
    return staging.StagingBuffer(torch.device("cuda", 1))


def test_memory_is_touched_and_pinned_in_a_thread_and_waited_for(runtime: Runtime) -> None:
    copy = pinned_copy()
    runtime.go.clear()
    copy.begin_reserve(5000)
    assert runtime.calls == []
    threading.Timer(0.1, runtime.go.set).start()
    copy.wait_reserved()
    assert runtime.calls == [("pin", 5000, "reserve")] and copy._pinned and copy._buffer.numel() == 5000
    copy.wait_reserved()
    copy.reserve(4000)
    assert len(runtime.calls) == 1
    copy.release()
    assert runtime.pinned == {} and copy._buffer.numel() == 0 and not copy._pinned


def test_a_save_waits_for_memory_that_is_begun(runtime: Runtime) -> None:
    copy = pinned_copy()
    runtime.go.clear()
    copy.begin_reserve(5000)
    threading.Timer(0.1, runtime.go.set).start()
    copy.start([torch.ones(100)], [True])
    assert runtime.calls == [("pin", 5000, "reserve")] and copy.finish()[0].eq(1).all()
    copy.release()


def test_what_is_begun_twice_ends_with_the_larger(runtime: Runtime) -> None:
    copy = pinned_copy()
    for size in (5000, 4000, 9000):
        copy.begin_reserve(size)
    copy.wait_reserved()
    assert [call[:2] for call in runtime.calls] == [("pin", 5000), ("unpin", 5000), ("pin", 9000)]
    assert copy._buffer.numel() == 9000 and copy._pinned
    copy.release()
    assert runtime.pinned == {}


def test_release_waits_for_what_is_begun(runtime: Runtime) -> None:
    copy = pinned_copy()
    runtime.go.clear()
    copy.begin_reserve(5000)
    while not hasattr(runtime, "touched"):
        pass
    threading.Timer(0.1, runtime.go.set).start()
    copy.release()
    assert runtime.pinned == {} and copy._buffer.numel() == 0
    assert "reserve" not in {thread.name for thread in threading.enumerate()}


def test_who_is_interrupted_while_waiting_still_releases_what_is_begun(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(call: object) -> None:
        raise KeyboardInterrupt

    copy = pinned_copy()
    runtime.go.clear()
    copy.begin_reserve(5000)
    while not hasattr(runtime, "touched"):
        pass
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging.ThreadCall, "wait", interrupt)
        copy.wait_reserved()
    threading.Timer(0.1, runtime.go.set).start()
    copy.release()
    assert runtime.pinned == {} and copy._buffer.numel() == 0
    assert "reserve" not in {thread.name for thread in threading.enumerate()}


def test_what_is_released_before_its_pages_are_there_is_not_pinned(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(memory_N: torch.Tensor, is_stopped: Callable[[], bool]) -> None:
        while not is_stopped():
            pass

    pinned: list[int] = []
    monkeypatch.setattr(staging, "touch_pages", touch)
    monkeypatch.setattr(staging, "pin", lambda memory_N: pinned.append(memory_N.numel()))
    copy = pinned_copy()
    copy.begin_reserve(5000)
    copy.release()
    assert pinned == [] and copy._buffer.numel() == 0


@pytest.mark.parametrize("wait", ["wait_reserved", "reserve", "begin_reserve", "start", "release"])
def test_memory_that_there_is_not_is_an_error_where_it_is_waited_for(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    def fail(size: int) -> torch.Tensor:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(staging, "map_pages", fail)
    copy = pinned_copy()
    copy.begin_reserve(5000)
    if wait == "release":
        copy.release()
        copy.wait_reserved()
        return
    given = {"reserve": (1,), "begin_reserve": (1,), "start": ([torch.ones(1)], [True])}
    with pytest.raises(OSError, match="Cannot allocate memory"):
        getattr(copy, wait)(*given.get(wait, ()))
    assert copy._buffer.numel() == 0 and not copy._pinned


def test_where_the_system_pins_no_more_the_memory_is_there_all_the_same(runtime: Runtime) -> None:
    copy, runtime.result = pinned_copy(), 2
    copy.reserve(5000)
    assert copy._buffer.numel() == 5000 and not copy._pinned
    copy.release()
    assert [call[0] for call in runtime.calls] == ["pin"]


def test_on_a_cpu_no_page_is_touched(runtime: Runtime) -> None:
    copy = staging.StagingBuffer(torch.device("cpu"))
    copy.reserve(5000)
    assert copy._buffer.numel() == 5000 and not copy._pinned and not hasattr(runtime, "touched")
