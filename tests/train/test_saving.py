"""Savings of a run: old checkpoints go once the new one is known to be good, and a failed one costs itself alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.checkpoint.listing import all_checkpoints, step_of
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.checkpoint.save import SaveFailed
from mmtrain.config import ParallelConfig
from mmtrain.parallel.layout import Layout
from mmtrain.runs.profile_step import _quiet
from mmtrain.train import saving
from mmtrain.train.phase_layouts import PhaseLayout
from mmtrain.train.saving import Saver, begin_copy
from tests.checkpoint.fake import checkpoint, config

LAYOUT = Layout(pp=1, dp=2, cp=1, tp=1, edp=1, ep=2, etp=1)
MARKS = {"phase_end": False}
CONTEXT = SimpleNamespace(device=torch.device("cpu"))
SESSION = SimpleNamespace(
    context=CONTEXT, model=SimpleNamespace(module=None), optimizer=None, laid=PhaseLayout(ParallelConfig(), LAYOUT)
)
GPU_SESSION = SimpleNamespace(
    context=SimpleNamespace(device=torch.device("cuda", 1)), model=SimpleNamespace(module="model")
)


class Reader:
    """Stands for the report and the inputs of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def fingerprints(self) -> dict[str, Any]:
        return {"sources": []}


class Pending:
    """Stands for a checkpoint that is being written: it is there once it is finished."""

    is_writing, bytes, seconds = True, 10**6, 1.0

    def __init__(self, path: Path, step: int, copy: object) -> None:
        self.path, self.step, self.copy, self.gone = path, step, copy, False

    def let_go(self) -> None:
        self.gone = True

    def finish(self) -> Path:
        if self.step == 13:
            raise SaveFailed("no room")
        return checkpoint(self.path, {"model": {}}, self.step)


@pytest.fixture
def saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saver:
    """A saver that keeps one checkpoint, whose shards are no model's; the step 13 does not fit on the disk."""

    def begin(folder: Path, model: object, optimizer: object, progress: Progress, *given: Any, **more: Any) -> Pending:
        assert more["extra"] == {"corpora": {"sources": []}, "layout": asdict(LAYOUT), "frozen": [], "phase_end": False}
        return Pending(folder / f"step-{progress.step:08d}", progress.step, more["copy"])

    monkeypatch.setattr(saving, "begin_save", begin)
    monkeypatch.setattr(saving.dist, "get_rank", lambda: 0)
    options = config(tmp_path, "checkpoint.keep=1")
    return Saver(RunFolder(options), options, Reader(), Reader())


def steps(tmp_path: Path) -> list[int]:
    return [step_of(path) for path in all_checkpoints(tmp_path / "r/checkpoints")]


def test_old_checkpoints_stay_until_the_new_one_is_known_to_be_good(saver: Saver, tmp_path: Path) -> None:
    for step, left in ((1, [1]), (2, [2]), (3, [3])):
        before = steps(tmp_path)
        saver.save(SESSION, Progress(step), 1e4, MARKS)
        assert steps(tmp_path) == [*before, step]
        saver.remove_old()
        assert steps(tmp_path) == left


def test_a_save_that_fails_deletes_nothing_and_the_last_one_is_an_error(saver: Saver, tmp_path: Path) -> None:
    saver.save(SESSION, Progress(11), 1e4, MARKS)
    saver.remove_old()
    saver.save(SESSION, Progress(13), 1e4, MARKS)
    saver.remove_old()
    assert steps(tmp_path) == [11] and "no room; the run goes on" in saver._report.lines[-1]
    with pytest.raises(SaveFailed):
        saver.save(SESSION, Progress(13), 1e4, MARKS, last=True)


def test_one_is_written_beside_the_steps_and_named_when_it_is_settled(saver: Saver, tmp_path: Path) -> None:
    saver.reserve(SESSION)
    assert not saver.is_writing
    saver.let_go()
    saver.save(SESSION, Progress(21), 1e4, MARKS)
    assert saver.is_writing and steps(tmp_path) == [] and saver.newest is None
    pending = saver._pending[1]
    assert pending.copy is not None
    saver.let_go()
    assert pending.gone
    saver.save(SESSION, Progress(22), 1e4, MARKS)  # one at a time: the first is waited for
    assert steps(tmp_path) == [21] and saver.newest[0] == 21
    saver.settle()
    saver.settle()
    assert steps(tmp_path) == [21, 22] and saver.newest[0] == 22 and not saver.is_writing
    assert "step-00000022: 1 MB in 1 s, the steps waited " in saver._report.lines[-1]
    saver.save(SESSION, Progress(23), 1e4, MARKS, last=True)
    assert steps(tmp_path) == [21, 22, 23]
    saver.release()
    saver.save(SESSION, Progress(24), 1e4, MARKS)
    assert steps(tmp_path) == [21, 22, 23, 24] and not saver.is_writing  # without memory for a copy it is waited for


def test_one_that_fails_beside_the_steps_is_told_and_the_last_one_is_an_error(saver: Saver, tmp_path: Path) -> None:
    saver.reserve(SESSION)
    saver.save(SESSION, Progress(13), 1e4, MARKS)
    saver.settle()
    assert "step 13: no room; the run goes on" in saver._report.lines[-1] and saver.newest is None
    saver.save(SESSION, Progress(13), 1e4, MARKS)
    saver.save(SESSION, Progress(14), 1e4, MARKS, last=True)  # what failed is an earlier one
    assert steps(tmp_path) == [14] and saver.newest[0] == 14
    with pytest.raises(SaveFailed):
        saver.save(SESSION, Progress(13), 1e4, MARKS, last=True)


def test_what_a_disk_kept_of_one_that_failed_goes_once_it_can_be_written_again(saver: Saver, tmp_path: Path) -> None:
    kept = tmp_path / "r/checkpoints/step-00000013.writing"
    saver.save(SESSION, Progress(13), 1e4, MARKS)
    kept.mkdir(parents=True)  # it could not be removed either
    saver.save(SESSION, Progress(13), 1e4, MARKS)
    assert kept.exists()
    saver.save(SESSION, Progress(14), 1e4, MARKS)
    assert steps(tmp_path) == [14] and not kept.exists()


@pytest.mark.parametrize("option", ["checkpoint.asynchronous=false", "checkpoint.interval=0"])
def test_a_run_that_waits_has_no_memory_for_copies(saver: Saver, tmp_path: Path, option: str) -> None:
    saver._config = config(tmp_path, option)
    saver.begin_reserve(SESSION)
    saver.reserve(SESSION)
    assert saver._copy is None and begin_copy(saver._config, GPU_SESSION) is None


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of memory for copies, in order."""
    asked: list[tuple[Any, ...]] = []

    class Copy:
        def __init__(self, device: torch.device) -> None:
            asked.append(("make", str(device)))

        def begin_reserve(self, size: int) -> None:
            asked.append(("begin", size))

        def wait_reserved(self) -> None:
            asked.append(("wait",))

        def release(self) -> None:
            asked.append(("release",))

    monkeypatch.setattr(saving, "StagingBuffer", Copy)
    monkeypatch.setattr(saving, "most_bytes", lambda module: {"model": 1000}[module])
    return asked


def test_memory_that_is_begun_is_waited_for_and_not_begun_anew(saver: Saver, copies: list[tuple[Any, ...]]) -> None:
    saver.begin_reserve(GPU_SESSION)
    saver.begin_reserve(GPU_SESSION)
    assert copies == [("make", "cuda:1"), ("begin", 1000)]
    saver.reserve(GPU_SESSION)
    assert copies[2:] == [("wait",)]
    saver.release()
    saver.reserve(GPU_SESSION)
    assert copies[3:] == [("release",), ("make", "cuda:1"), ("begin", 1000), ("wait",)]


def test_a_saver_takes_memory_that_was_begun_before_it_was_made(
    saver: Saver, copies: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    made = Saver(saver._folder, saver._config, Reader(), Reader(), begin_copy(saver._config, GPU_SESSION))
    made.reserve(GPU_SESSION)
    assert copies == [("make", "cuda:1"), ("begin", 1000), ("wait",)]


def test_on_a_cpu_nothing_is_reserved_before_the_first_save(saver: Saver, copies: list[tuple[Any, ...]]) -> None:
    saver.reserve(SESSION)
    assert copies == [("make", "cpu"), ("wait",)]


def test_a_profile_has_no_memory_for_copies(saver: Saver) -> None:
    assert begin_copy(_quiet(saver._config), GPU_SESSION) is None
