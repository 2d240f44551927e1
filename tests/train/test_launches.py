"""A launch's end is on record with its reason, and the commit is read from git's files of any kind of checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.errors import RunStopped
from mmtrain.log.metrics import read_metrics
from mmtrain.train.launches import FILE_NAME, Launches, commit_of


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


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    first, second = "a" * 40, "b" * 40
    package, git = tmp_path / "repo/mmtrain", tmp_path / "repo/.git"
    package.mkdir(parents=True)
    assert commit_of(package) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{first}\n")
    assert commit_of(package) == first
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(package) is None  # no commit yet
    (git / "packed-refs").write_text(f"# pack-refs\n{second} refs/heads/other\n{first} refs/heads/main\n")
    assert commit_of(package) == first
    (git / "refs/heads/main").write_text(f"{second}\n")
    assert commit_of(package) == second
    tree, own = tmp_path / "tree/mmtrain", git / "worktrees/tree"
    tree.mkdir(parents=True)
    own.mkdir(parents=True)
    (tmp_path / "tree/.git").write_text(f"gitdir: {own}\n")
    (own / "HEAD").write_text("ref: refs/heads/main\n")
    (own / "commondir").write_text("../..\n")
    assert commit_of(tree) == second
