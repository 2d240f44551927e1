"""launch/compare.py: layouts that train alike, runs that do not, and layouts that cannot run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mmtrain.runs.compare import relative_difference
from tests.dist.runs import ROOT, SMALL, environment


@pytest.fixture(autouse=True)
def child_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def compare(*arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "launch" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*SMALL, *arguments])


@pytest.mark.slow
def test_equal_layouts(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = ["--layout", "1", "--layout", "4 parallel.tp=2 parallel.ep=2 parallel.activation_checkpoint=true"]
    assert compare(f"data.path={corpus}", *layouts, "--steps", "3", "--keep", str(tmp_path / "new")) == 0
    text = capsys.readouterr().out
    assert "equal" in text and str(tmp_path / "new") in text
    assert len([line for line in text.splitlines() if line.lstrip()[:1].isdigit()]) == 3
    assert (tmp_path / "new" / "layout1" / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_different_runs(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(f"data.path={corpus}", "--layout", "1", "--layout", "1 run.seed=5", "--steps", "1") == 1
    text = capsys.readouterr().out
    assert "DIFFERENT" in text and "of layout 1, step 1)" in text


@pytest.mark.slow
def test_a_layout_that_cannot_run_is_told_by_its_own_error(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(f"data.path={corpus}", "--layout", "2 parallel.tp=3", "--layout", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --layout=2 parallel.tp=3: parallel.tp=3") and "2 / 3 is not whole" in error


@pytest.mark.parametrize("arguments", [["--layout", "1"], ["--layout", "1", "--layout", "tp=2"],
                                       ["--layout", "1", "--layout", "1", "--steps", "0"]], ids=str)  # fmt: skip
def test_wrong_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*arguments) == 2
    assert capsys.readouterr().err.startswith("error: --")


def test_what_is_no_number_is_never_equal() -> None:
    nan, inf = float("nan"), float("inf")
    assert relative_difference(2.0, 2.0) == 0 and relative_difference(2.0, 1.0) == 0.5
    assert all(relative_difference(a, b) == inf for a, b in ((nan, 1.0), (1.0, nan), (nan, nan), (0.0, 1e-9), (1.0, inf)))
