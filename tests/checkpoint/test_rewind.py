"""A run that goes on from an earlier checkpoint: the branch that it leaves is set aside and never taken again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmtrain.checkpoint.listing import newest_checkpoint, remove_old
from mmtrain.checkpoint.run_folder import RunFolder, Start
from mmtrain.config import CheckpointConfig
from mmtrain.log.metrics import MetricsWriter
from tests.checkpoint.fake import checkpoint, config, said


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that holds checkpoints of the steps 4, 8 and 10, metrics of ten steps, and a page of wandb."""
    run = tmp_path / "r"
    for step in (4, 8, 10):
        checkpoint(run / f"checkpoints/step-{step:08d}", config(tmp_path), step)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 11)))
    (run / "wandb").mkdir()
    (run / "wandb/mmtrain_run_id").write_text("abc")
    return run


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_branch_after_the_chosen_step_is_set_aside(run: Path) -> None:
    chosen = run / "checkpoints/step-00000004"
    folder = RunFolder(config(run.parent, f"run.resume={chosen}"))
    line = said(folder.claim(Start(resume=chosen)))
    (aside,) = (run / "abandoned").iterdir()
    assert str(aside) in line and "step-00000008, step-00000010, 6 records" in line
    assert aside.name.endswith("-after-step-4")
    assert names(run / "checkpoints") == ["step-00000004"]
    assert names(aside / "checkpoints") == ["step-00000008", "step-00000010"]
    assert steps(aside / "metrics.jsonl") == [5, 6, 7, 8, 9, 10]
    assert (aside / "wandb/mmtrain_run_id").read_text() == "abc" and not (run / "wandb/mmtrain_run_id").exists()
    MetricsWriter(run / "metrics.jsonl", 4).close()  # as the report does next
    assert steps(run / "metrics.jsonl") == [1, 2, 3, 4]
    assert newest_checkpoint("o", run, pytest.fail) == chosen
    for step in (5, 6):
        written = checkpoint(run / f"checkpoints/step-{step:08d}", config(run.parent), step)
        remove_old(run / "checkpoints", CheckpointConfig(keep=2), written)
    assert newest_checkpoint("o", run, pytest.fail) == written
    assert names(run / "checkpoints") == ["step-00000005", "step-00000006"]
    assert names(aside / "checkpoints") == ["step-00000008", "step-00000010"]


def test_a_second_rewind_of_one_day_has_a_folder_of_its_own(run: Path) -> None:
    for step in (8, 4):
        chosen = run / f"checkpoints/step-{step:08d}"
        RunFolder(config(run.parent, f"run.resume={chosen}")).claim(Start(resume=chosen))
        checkpoint(run / "checkpoints/step-00000010", config(run.parent), 10)
    RunFolder(config(run.parent, f"run.resume={chosen}")).claim(Start(resume=chosen))
    assert sorted(name[11:] for name in names(run / "abandoned")) == ["after-step-4", "after-step-4-2", "after-step-8"]


def test_a_crash_after_the_newest_checkpoint_sets_nothing_aside(run: Path) -> None:
    newest = run / "checkpoints/step-00000010"
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 13)))
    assert RunFolder(config(run.parent, "run.resume=auto")).claim(Start(resume=newest)) == []
    assert not (run / "abandoned").exists()


def test_another_run_s_checkpoint_takes_the_place_of_all_that_was_done(run: Path) -> None:
    chosen = checkpoint(run.parent / "a/checkpoints/step-00000009", config(run.parent), 9)
    folder = RunFolder(config(run.parent, f"run.resume={chosen}"))
    assert "10 records" in said(folder.claim(Start(resume=chosen)))
    (aside,) = (run / "abandoned").iterdir()
    assert names(aside / "checkpoints") == ["step-00000004", "step-00000008", "step-00000010"]
    assert steps(aside / "metrics.jsonl") == list(range(1, 11)) and not (run / "metrics.jsonl").exists()
    assert chosen.exists()


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_kill_while_it_is_set_aside_leaves_the_branch_shorter_and_whole(
    run: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, replace = [], os.replace

    def dies(source: Path, target: Path) -> None:
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append(source)
        replace(source, target)

    chosen = run / "checkpoints/step-00000004"
    folder = RunFolder(config(run.parent, f"run.resume={chosen}"))
    with monkeypatch.context() as patched:
        patched.setattr("mmtrain.checkpoint.abandon.os.replace", dies)
        with pytest.raises(KeyboardInterrupt):
            folder.claim(Start(resume=chosen))
    assert steps(run / "metrics.jsonl") == list(range(1, 11))
    assert names(run / "checkpoints") == ["step-00000004", "step-00000008", "step-00000010"][: 3 - fails_at]
    folder.claim(Start(resume=chosen))
    assert names(run / "checkpoints") == ["step-00000004"]


def test_one_written_just_now_stays_whatever_its_number(run: Path) -> None:
    written = run / "checkpoints/step-00000004"
    remove_old(run / "checkpoints", CheckpointConfig(keep=0), written)
    assert len(names(run / "checkpoints")) == 3
    remove_old(run / "checkpoints", CheckpointConfig(keep=1), written)
    assert names(run / "checkpoints") == ["step-00000004", "step-00000010"]
    (run / "checkpoints/step-00000010/meta.json").write_text("")
    remove_old(run / "checkpoints", CheckpointConfig(keep=1))
    assert "step-00000004" in names(run / "checkpoints")


KEPT = {
    "the newest alone": ({}, [11, 12]),
    "every fourth": ({"keep_every": 4}, [4, 8, 11, 12]),
    "ends of phases": ({"keep_phase_ends": True}, [5, 11, 12]),
    "the two best": ({"keep_best": 2}, [7, 9, 11, 12]),
    "one of the newest is the best": ({"keep_best": 1, "keep": 4}, [9, 10, 11, 12]),
    "all of these": ({"keep": 1, "keep_every": 6, "keep_phase_ends": True, "keep_best": 1}, [5, 6, 9, 12]),
    "all": ({"keep": 0, "keep_every": 4}, list(range(1, 13))),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_beside_the_newest(tmp_path: Path, name: str) -> None:
    """Step 5 ends a phase; losses were measured at 3, 7 and 9, the later of equal ones is the better."""
    folder, (options, left) = tmp_path / "checkpoints", KEPT[name]
    for step in range(1, 13):
        marks = {"phase_end": step == 5} | ({"valid_loss": {3: 2.5, 7: 2.0, 9: 2.0}[step]} if step in (3, 7, 9) else {})
        checkpoint(folder / f"step-{step:08d}", {"model": {}}, step, **marks)
    remove_old(folder, CheckpointConfig(**options))
    assert [int(path.name[5:]) for path in sorted(folder.iterdir())] == left
    remove_old(folder, CheckpointConfig(**options))
    assert len(list(folder.iterdir())) == len(left)


def test_a_damaged_record_is_kept_by_nothing(tmp_path: Path) -> None:
    for step in (4, 5, 6):
        checkpoint(tmp_path / f"step-{step:08d}", {"model": {}}, step, phase_end=True, valid_loss=float(step))
    (tmp_path / "step-00000005/meta.json").write_text("{")
    remove_old(tmp_path, CheckpointConfig(keep=1, keep_phase_ends=True, keep_best=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
