"""Savings of a run: old checkpoints go once the new one is known to be good, and a failed one costs itself alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtrain.checkpoint.dcp import SaveFailed
from mmtrain.checkpoint.listing import all_checkpoints, step_of
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.parallel.layout import Layout
from mmtrain.train import saving
from mmtrain.train.saving import Saver
from tests.checkpoint.fake import checkpoint, config

LAYOUT = Layout(pp=1, dp=2, cp=1, tp=1, edp=1, ep=2, etp=1)
SESSION = SimpleNamespace(model=SimpleNamespace(module=None), optimizer=None, laid=SimpleNamespace(layout=LAYOUT))


class Reader:
    """Stands for the report and the inputs of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def fingerprints(self) -> dict[str, Any]:
        return {"sources": []}


@pytest.fixture
def saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saver:
    """A saver that keeps one checkpoint, whose shards are no model's; the step 13 does not fit on the disk."""

    def save(
        folder: Path, model: object, optimizer: object, progress: Progress, *given: object, **more: object
    ) -> Path:
        if progress.step == 13:
            raise SaveFailed("no room")
        assert more["extra"] == {"corpora": {"sources": []}, "layout": asdict(LAYOUT)}
        return checkpoint(folder / f"step-{progress.step:08d}", {"model": {}}, progress.step)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    monkeypatch.setattr(saving.dist, "get_rank", lambda: 0)
    options = config(tmp_path, "checkpoint.keep=1")
    return Saver(RunFolder(options), options, Reader(), Reader())


def steps(tmp_path: Path) -> list[int]:
    return [step_of(path) for path in all_checkpoints(tmp_path / "r/checkpoints")]


def test_old_checkpoints_stay_until_the_new_one_is_known_to_be_good(saver: Saver, tmp_path: Path) -> None:
    for step, left in ((1, [1]), (2, [2]), (3, [3])):
        before = steps(tmp_path)
        saver.save(SESSION, Progress(step), 1e4, last=False)
        assert steps(tmp_path) == [*before, step]
        saver.remove_old()
        assert steps(tmp_path) == left


def test_a_save_that_fails_deletes_nothing_and_the_last_one_is_an_error(saver: Saver, tmp_path: Path) -> None:
    saver.save(SESSION, Progress(11), 1e4, last=False)
    saver.remove_old()
    saver.save(SESSION, Progress(13), 1e4, last=False)
    saver.remove_old()
    assert steps(tmp_path) == [11] and "no room; the run goes on" in saver._report.lines[-1]
    with pytest.raises(SaveFailed):
        saver.save(SESSION, Progress(13), 1e4, last=True)
