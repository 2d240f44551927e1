"""TensorBoard's files hold the series of the metrics, and what a resumed run writes again is there once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mmtrain.config import LogConfig
from mmtrain.errors import ConfigError
from mmtrain.log.tensorboard_tracker import FOLDER, TensorBoardTracker, check_tensorboard

ON = LogConfig(tensorboard=True)


def test_series_are_read_back_and_a_resumed_run_hides_what_it_does_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, steps, shift in ((0, (1, 2, 3), 0.0), (2, (3, 4), 10.0)):
        tracker = TensorBoardTracker(ON, tmp_path, first)
        for step in steps:
            tracker.log({"step": step, "loss": step + shift, "phase": "a", "router_entropy": [0.5, 0.25]}, step)
        tracker.finish()
    events = accumulator.EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 13), (4, 14)]
    assert set(events.Tags()["scalars"]) == {"loss", "router_entropy/layer_00", "router_entropy/layer_01"}


def test_off_writes_nothing(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(LogConfig(), tmp_path, 0)
    tracker.log({"step": 1, "loss": 1.0}, 1)
    tracker.finish()
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    check_tensorboard(LogConfig())
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_tensorboard(ON)
