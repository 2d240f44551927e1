"""A launch's end is on record with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.errors import RunStopped
from mmtrain.log.metrics import read_metrics
from mmtrain.train.launches import FILE_NAME, Launches


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (None, None),
        (RunStopped("stopped by SIGTERM after step 7", 143), "stopped by SIGTERM after step 7"),
        (RuntimeError("no room\nat all"), "RuntimeError: no room"),
    ],
)
def test_why_a_launch_ended(tmp_path: Path, error: BaseException | None, why: str | None) -> None:
    for start in (0, 7):  # the second launch keeps the first one's lines
        launch = Launches(tmp_path, print)
        launch.begin(start, 20, {"device": "CPU"})
        launch.end(7, error)
    found = read_metrics(tmp_path / FILE_NAME)
    assert [(one["event"], one["step"]) for one in found] == [("began", 0), ("ended", 7), ("began", 7), ("ended", 7)]
    assert found[1]["why"] == why and found[0]["last_step"] == 20 and found[0]["device"] == "CPU"
