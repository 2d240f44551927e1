"""launch/compare.py: layouts that train alike, runs that do not, and layouts that cannot run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mmtrain.log.gradients import GradientRecord
from mmtrain.runs.compare import LayoutRun, relative_difference
from mmtrain.runs.compare import compare as run_compare
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


def figures_of(monkeypatch: pytest.MonkeyPatch, precision: str, error: float) -> None:
    """Layouts with equal losses and norms, the second of which has one gradient that is off by `error`."""

    def made(launcher: Path, run: LayoutRun, overrides: object, steps: int, folder: Path, name: str) -> list[dict]:
        (folder / name).mkdir()
        scale = 1.0 + (error if name == "layout1" else 0.0)
        rows = {"embed_tokens.weight": [30.0, 30.0], "layers.0.ffn.experts.w2_EDF": [1.0, scale]}
        GradientRecord(precision, rows).write(folder / name)
        return [{"step": 1, "loss": 5.0, "grad_norm": 30.0}]

    monkeypatch.setattr("mmtrain.runs.compare._train", made)


@pytest.mark.parametrize(
    ("precision", "error", "tolerance", "code"),
    [("float32", 0.0, None, 0), ("float32", 1e-6, None, 0), ("float32", 3e-3, None, 1), ("float32", 3e-3, 1e-2, 0),
     ("float32", 1e-6, 1e-7, 1), ("bfloat16", 3e-2, None, 0), ("bfloat16", 0.5, None, 1),
     ("float32", float("nan"), None, 1)],
)  # fmt: skip
def test_the_verdict_follows_the_worst_gradient(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    error: float,
    tolerance: float | None,
    code: int,
) -> None:
    figures_of(monkeypatch, precision, error)
    assert run_compare(Path(), ["1", "2"], [], 1, tolerance) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(": DIFFERENT" if code else ": equal")
    assert not code or "(layers.0.ffn.experts.w2_EDF of layout 1)" in last


@pytest.mark.slow
def test_equal_layouts(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = ["--layout", "1", "--layout", "4 parallel.tp=2 parallel.ep=2 parallel.activation_checkpoint=true"]
    assert compare(f"data.path={corpus}", *layouts, "--steps", "3", "--keep", str(tmp_path / "new")) == 0
    text = capsys.readouterr().out
    assert "equal" in text and str(tmp_path / "new") in text
    rows = [line for line in text.splitlines() if line.lstrip()[:1].isdigit()]
    assert len(rows) == 3 + 1  # the steps, and the gradients of the second layout
    assert (tmp_path / "new" / "layout1" / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_all_axes_at_once_train_as_one_process(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CP x TP x EP x ETP x PP, each of two, on eight processes."""
    every = " ".join(f"parallel.{axis}=2" for axis in ("cp", "tp", "ep", "etp", "pp"))
    layouts = ["--layout", "1", "--layout", f"8 {every} parallel.activation_checkpoint=block"]
    options = [f"data.path={corpus}", "model.ffn_hidden_size=32"]
    assert compare(*options, *layouts, "--steps", "1", "--keep", str(tmp_path / "kept")) == 0
    assert ": equal" in capsys.readouterr().out
    assert "cp_balance" in (tmp_path / "kept" / "layout1" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_different_runs(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(f"data.path={corpus}", "--layout", "1", "--layout", "1 run.seed=5", "--steps", "1") == 1
    text = capsys.readouterr().out
    assert "DIFFERENT" in text and "of layout 1, step 1)" in text


FAULTY = """
import runpy, sys
from torch.distributed.fsdp import FSDPModule
divide = FSDPModule.set_gradient_divide_factor  # called where an expert has other copies than the rest
FSDPModule.set_gradient_divide_factor = lambda self, factor: divide(self, factor / 1.003)
sys.path[0] = {folder!r}
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_experts_gradients_that_are_off_by_little_are_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By 0.3%, and with the experts' small share in it: the losses and norms of both layouts stay within 1e-5."""
    launcher = tmp_path / "faulty.py"
    launcher.write_text(FAULTY.format(folder=str(ROOT / "launch"), path=str(ROOT / "launch" / "pretrain.py")))
    overrides = [*SMALL, f"data.path={corpus}", "optim.clip_grad=null"]
    assert run_compare(launcher, ["1", "2 parallel.ep=2"], overrides, steps=1) == 1
    lines = capsys.readouterr().out.splitlines()
    figure, gradient = (next(line for line in lines if f"difference of a {kind}" in line)
                        for kind in ("figure", "gradient"))  # fmt: skip
    assert "ffn.experts.w" in gradient and " of layout 1), tolerance 1e-05: DIFFERENT" in gradient
    assert 1.5e-3 < float(gradient.split("gradient ")[1].split()[0]) < 6e-3
    assert float(figure.split("figure ")[1].split()[0]) < 1e-4
    assert any("4 of " in line for line in lines)  # two weights of each of two layers


@pytest.mark.slow
def test_a_layout_that_cannot_run_is_told_by_its_own_error(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(f"data.path={corpus}", "--layout", "2 parallel.tp=3", "--layout", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --layout=2 parallel.tp=3: parallel.tp=3") and "2 / 3 is not whole" in error


@pytest.mark.parametrize("arguments", [["--layout", "1"], ["--layout", "1", "--layout", "tp=2"],
                                       ["--layout", "1", "--layout", "1", "--steps", "0"],
                                       *(["--layout", "1", "--layout", "1", "--tolerance", wrong]
                                         for wrong in ("0", "nan", "inf"))], ids=str)  # fmt: skip
def test_wrong_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*arguments) == 2
    assert capsys.readouterr().err.startswith("error: --")


def test_a_command_line_that_cannot_be_read_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare("--layout", "1", "--layout", "1", "--tolerance", "abc")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--tolerance" in error and error.count("\n") == 1


def test_what_is_no_number_is_never_equal() -> None:
    nan, inf = float("nan"), float("inf")
    assert relative_difference(2.0, 2.0) == 0 and relative_difference(2.0, 1.0) == 0.5
    assert all(
        relative_difference(a, b) == inf for a, b in ((nan, 1.0), (1.0, nan), (nan, nan), (0.0, 1e-9), (1.0, inf))
    )
