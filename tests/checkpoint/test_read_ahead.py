"""Blocks of a file come whole and in order, whatever its size and however its reads are answered."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtrain.checkpoint import read_ahead
from mmtrain.checkpoint.read_ahead import blocks_of

Read = Callable[[int, list[memoryview], int], int]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Path, bytes]]:
    """Files that are read in blocks of 10 bytes."""
    monkeypatch.setattr(read_ahead, "_BLOCK", 10)

    def make(size: int) -> tuple[Path, bytes]:
        data = os.urandom(size)
        (tmp_path / "file").write_bytes(data)
        return tmp_path / "file", data

    return make


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 40, 41, 50, 99, 1000])
def test_bytes_are_those_of_the_file(made: Callable[[int], tuple[Path, bytes]], size: int) -> None:
    path, data = made(size)
    blocks = [bytes(block) for block in blocks_of(path)]
    assert b"".join(blocks) == data
    assert [len(block) for block in blocks] == [10] * (size // 10) + [size % 10] * (size % 10 > 0)


def test_reads_may_be_short_and_end_in_any_order(
    made: Callable[[int], tuple[Path, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = made(95)
    later, read = threading.Event(), os.preadv

    def preadv(file: int, views: list[memoryview], start: int) -> int:
        if start == 10:
            later.set()
        elif start == 0:  # only once a later one has been asked for
            assert later.wait(60)
        return read(file, [views[0][:3]], start)

    monkeypatch.setattr(os, "preadv", preadv)
    assert b"".join(bytes(block) for block in blocks_of(path)) == data


def test_no_more_blocks_are_asked_for_than_there_is_room_for(
    made: Callable[[int], tuple[Path, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = made(300)
    asked, read = [], os.preadv

    def preadv(file: int, views: list[memoryview], start: int) -> int:
        asked.append(start)
        return read(file, views, start)

    monkeypatch.setattr(os, "preadv", preadv)
    for i, block in enumerate(blocks_of(path)):
        assert bytes(block) == data[10 * i : 10 * i + 10]
        assert max(asked) <= 10 * (i + read_ahead._READERS)
    assert sorted(asked) == list(range(0, 300, 10))


def test_a_file_that_is_cut_short_ends_where_it_does(made: Callable[[int], tuple[Path, bytes]]) -> None:
    path, data = made(200)
    blocks = blocks_of(path)
    found = bytes(next(blocks))
    os.truncate(path, 105)
    found += b"".join(bytes(block) for block in blocks)
    assert found == data[:105]


def test_errors_are_those_of_the_reads(
    made: Callable[[int], tuple[Path, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = made(200)

    def preadv(file: int, views: list[memoryview], start: int) -> int:
        if start == 120:
            raise OSError(5, "Input/output error")
        views[0][:] = data[start : start + len(views[0])]
        return len(views[0])

    monkeypatch.setattr(os, "preadv", preadv)
    seen = []
    with pytest.raises(OSError, match="Input/output error"):
        for block in blocks_of(path):
            seen.append(bytes(block))
    assert b"".join(seen) == data[:120]
    with pytest.raises(FileNotFoundError):
        next(blocks_of(path.with_name("none")))


def test_who_stops_early_leaves_no_thread(made: Callable[[int], tuple[Path, bytes]]) -> None:
    blocks = blocks_of(made(500)[0])
    next(blocks)
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
