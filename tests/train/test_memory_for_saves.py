"""When a whole trainer begins to have memory for its saves, waits for it, and gives it back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.checkpoint.progress import Progress
from mmtrain.errors import ConfigError
from mmtrain.train import trainer as module
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.trainer import Trainer
from tests.checkpoint.fake import config
from tests.train.test_trainer import PHASES


class Copy:
    """Stands for the memory of copies."""

    def __init__(self, done: list[Any], fails: bool = False) -> None:
        self.done, self.fails = done, fails

    def wait_reserved(self) -> None:
        self.done.append("reserved")
        if self.fails:
            raise OSError(12, "Cannot allocate memory")

    def release(self) -> None:
        self.done.append("released")


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A whole trainer whose session, report and steps are made up; `done` lists what it did, `fails` what cannot be."""
    made = SimpleNamespace(done=[], fails="", tuned=False)

    def does(name: str, found: Any = None) -> Any:
        def do(*given: object, **named: object) -> Any:
            made.done.append(name)
            if made.fails == name:
                raise ConfigError(name, "x", "cannot be", "give another")
            return found

        return do

    class Told:
        note = launch = step = places = close = lambda *given: []

        def __enter__(self) -> Told:
            return self

        def __exit__(self, *error: object) -> None: ...

    context = SimpleNamespace(device=torch.device("cpu"), is_main=True)

    def begin_session(*given: object) -> SimpleNamespace:
        made.done.append("session")
        return SimpleNamespace(
            context=context, dtype=torch.float32, load=does("load"), prepare=does("prepare", []), close=does("close"),
            model=SimpleNamespace(is_tuned=made.tuned),
        )  # fmt: skip

    monkeypatch.setattr(module, "Session", begin_session)
    monkeypatch.setattr(
        module, "begin_copy", lambda *given: does("begin")() or Copy(made.done, made.fails == "reserved")
    )
    monkeypatch.setattr(module, "Report", lambda *given: Told())
    monkeypatch.setattr(module, "StopSignals", lambda **given: Told())
    for name in ("header_lines", "environment"):
        monkeypatch.setattr(module, name, lambda *given: [])
    monkeypatch.setattr(module, "peak_rate", lambda *given: 1.0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(Trainer, "_go_on_from", lambda self, path: Progress(1, 32, 0, 2, 32))
    monkeypatch.setattr(Trainer, "_train", does("train"))
    monkeypatch.setattr(module, "start_position", lambda start: Progress())
    options = config(tmp_path, PHASES)
    folder = SimpleNamespace(claim=does("claim", []), path=tmp_path)
    start = SimpleNamespace(resume=tmp_path / "step-1", notes=(), weights=None, eyes=None)

    def run() -> None:
        plan = RunPlan(scaled_phases(options.stage), 1, 1)
        Trainer(options, context, plan, None, folder, start).run(SimpleNamespace())

    made.run = run
    return made


@pytest.mark.parametrize("tuned", [False, True])
def test_memory_for_saves_is_begun_before_weights_are_read_and_there_before_the_first_step(
    launch: SimpleNamespace, tuned: bool
) -> None:
    launch.tuned = tuned
    launch.run()
    prepared = ["reserved", "prepare", "reserved"] if tuned else ["prepare", "reserved"]
    assert launch.done == ["session", "begin", "load", "claim", *prepared, "train", "close"]


@pytest.mark.parametrize("at", ["load", "claim", "prepare"])
def test_a_run_that_ends_before_its_first_step_gives_the_memory_back(launch: SimpleNamespace, at: str) -> None:
    launch.fails = at
    with pytest.raises(ConfigError, match="cannot be"):
        launch.run()
    assert launch.done[-2:] == [at, "released"] and launch.done.count("released") == 1


def test_memory_that_there_is_not_ends_a_run_before_its_first_step(launch: SimpleNamespace) -> None:
    launch.fails = "reserved"
    with pytest.raises(OSError, match="Cannot allocate memory"):
        launch.run()
    assert launch.done[-2:] == ["reserved", "released"] and "train" not in launch.done
