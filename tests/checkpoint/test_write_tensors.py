"""Files of tensors, written in parts while the next ones are made and the last ones brought to the disk."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmtrain.checkpoint import safetensors_file
from mmtrain.checkpoint.safetensors_file import Planned, write_tensors

BLOCK = 1 << 10
SHAPES = {"a": (700, 3), "none": (0, 4), "one": (), "b": (5,), "c": (64, 4), "d": (1000,)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 1 KB, of which four are brought to the disk at a time."""
    monkeypatch.setattr(safetensors_file, "BLOCK", BLOCK)
    monkeypatch.setattr(safetensors_file, "_SYNC", 4 * BLOCK)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}


def planned(of: dict[str, Tensor]) -> list[Planned]:
    return [Planned(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in of.items()]


def in_parts(tensor: Tensor, memory: list[Tensor]) -> Iterator[Tensor]:
    """Its parts, in turns in two pieces of memory that the next ones get too."""
    for part in tensor.flatten().split(BLOCK // tensor.itemsize):
        memory.reverse()
        yield memory[0][: part.numel()].copy_(part)


def ends(path: Path) -> list[str]:
    """Names of the threads that are left of writing, and of the files that are open still."""
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return [one.name for one in threading.enumerate() if one.name in ("parts", "sync")] + [
        one for one in opened if one == str(path)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_tensors_and_tensors_in_parts_are_read_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    given, path = tensors(dtype), tmp_path / "x"
    memory = [torch.empty(BLOCK // dtype.itemsize, dtype=dtype) for _ in range(2)]
    seen, told = bytearray(), []
    mixed = (in_parts(one, memory) if name in "ad" else one for name, one in given.items())
    write_tensors(path, planned(given), mixed, seen.extend, told.append)
    found = load_file(path)
    assert found.keys() == given.keys() and all(torch.equal(found[name], one) for name, one in given.items())
    assert bytes(seen) == path.read_bytes() and sum(told) == len(seen)
    assert max(told[1:]) <= BLOCK and ends(path) == []


def test_a_tensor_that_is_not_contiguous_is_written_in_its_own_order(tmp_path: Path) -> None:
    turned = torch.arange(2000.0).view(50, 40).T
    write_tensors(tmp_path / "x", planned({"t": turned}), [turned])
    assert torch.equal(load_file(tmp_path / "x")["t"], turned)


@pytest.mark.parametrize("call", range(4))
def test_an_error_of_any_sync_is_raised_though_the_ones_after_it_succeed(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, sync, calls = tensors(), os.fsync, []

    def failing(handle: int) -> None:
        calls.append(handle)
        if len(calls) == call + 1:  # the system tells a file's error once
            raise OSError(5, "Input/output error")
        sync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(safetensors_file.SideThread, "is_busy", False)  # none is left out
    with pytest.raises(OSError, match="Input/output error"):
        write_tensors(tmp_path / "x", planned(given), given.values())
    assert len(calls) >= call + 1 and ends(tmp_path / "x") == []


@pytest.mark.parametrize("size", [0, 3000, 9000])
def test_a_full_disk_is_an_error_and_nothing_stays_behind(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, (soft, hard) = tensors(), resource.getrlimit(resource.RLIMIT_FSIZE)
    synced: list[str] = []

    def slow(handle: int) -> None:
        time.sleep(0.1)
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))  # of no other file by now

    monkeypatch.setattr(os, "fsync", slow)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(tmp_path / "x", planned(given), given.values())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "x").stat().st_size == size and ends(tmp_path / "x") == []
    assert synced == ([str(tmp_path / "x")] if size > 4 * BLOCK else [])


def test_an_error_in_making_a_tensor_and_one_in_looking_are_raised(tmp_path: Path) -> None:
    given = tensors()

    def made() -> Iterator[Tensor]:
        yield given["a"]
        raise KeyError("b")

    with pytest.raises(KeyError):
        write_tensors(tmp_path / "x", planned(given), made())
    with pytest.raises(ValueError):
        write_tensors(tmp_path / "x", planned(given), given.values(), lambda part: int("x"))
    assert ends(tmp_path / "x") == []


@pytest.mark.parametrize("change", ["fewer", "more", "shape", "dtype", "short", "large"])
def test_tensors_that_are_not_as_planned_are_refused(change: str, tmp_path: Path) -> None:
    given = {"a": torch.ones(700), "b": torch.ones(5)}
    wrong = {
        "fewer": [given["a"]],
        "more": [*given.values(), torch.ones(1)],
        "shape": [given["a"].view(7, 100), given["b"]],
        "dtype": [given["a"].half(), given["b"]],
        "short": [iter(given["a"][:-1].split(200)), given["b"]],
        "large": [iter([given["a"]]), given["b"]],
    }[change]
    with pytest.raises((AssertionError, ValueError)):
        write_tensors(tmp_path / "x", planned(given), wrong)
