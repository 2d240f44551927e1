"""`launch/eval.py`: what it writes for a checkpoint, and what it refuses in one line, with its exit codes."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtrain.infer import load

SCRIPT = Path(__file__).resolve().parents[3] / "launch" / "eval.py"
Main = Callable[[list[str]], int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def main() -> Main:
    spec = importlib.util.spec_from_file_location("launch_eval", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_checkpoint_is_evaluated_into_its_run(run: Path, main: Main, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "n", "choices": ["x", "y"], "answer": 0}\n')
    args = [str(run), "--tasks", "needle,perplexity,choices", "--lengths", "2Ki", "--samples", "2", "--device", "cpu",
            "--choices-file", str(tmp_path / "q.jsonl")]  # fmt: skip
    assert main(args) == 0
    out, err = capsys.readouterr()
    (path,) = (run / "evals").glob("*.json")
    made = json.loads(path.read_text())
    assert [row["task"] for row in made["scores"]] == ["needle"] and made["files"]["choices"]["questions"] == 1
    last = out.splitlines()[-1]
    assert last.startswith("needle 0.0 at 2,048; loss ") and str(path) in last and f"{path.stem}.png" in last
    assert "5 samples of needle, perplexity, choices at 2,048" in err and "[2/5] needle at 2,048 tokens: score 0" in err
    assert "note: 2 samples leave out depths 0.5, 0.75, 1\n" in err
    assert main([*args, "--quiet"]) == 0
    again = capsys.readouterr()
    assert again.err == "" and again.out.splitlines()[:-1] == out.splitlines()[:-1]


WRONG = {
    "--tasks nedle": "--tasks=nedle: is no task; did you mean 'needle'?",
    "--tasks needle,": "--tasks=needle,: is no task",
    "--tasks needle": "--lengths=None: is needed for needle",
    "--tasks needle --lengths 4Q": "--lengths=4Q: not a count",
    "--tasks needle --lengths 4": r"--lengths=4: must lie in \[16, 4,194,304\]",
    "--tasks needle --lengths 4Ki,4096": "--lengths=4Ki,4096: names one twice",
    "--tasks needle --lengths 4Ki --samples 0": "--samples=0: must be at least 1",
    "--tasks needle --lengths 4Ki --samples 99999999999": "--samples=99999999999: must be at least 1, and 1,000,000 at",
    "--tasks needle --lengths 4Ki --seed -1": "--seed=-1: must be at least 0",
    "--tasks needle --lengths 4Ki --depths 0,2": r"--depths=2.0: must lie in \[0, 1\]",
    "--tasks needle --lengths 4Ki --depths a": "--depths=a: is no list of numbers",
    "--tasks needle --lengths 4Ki --depths 1,1": "--depths=1,1: names one twice",
    "--tasks needle --lengths 4Ki --max-running 0": "--max-running=0: must be at least 1",
    "--tasks needle --lengths 4Ki --device tpu": "--device=tpu: not a device",
    "--tasks needle --lengths 4Ki --rope-base nan": "--rope-base=nan: must be above 1",
    "--tasks choices": "--choices-file=None: is needed for choices",
    "--tasks longbench_v2 --longbench-file gone.json": "--longbench-file=gone.json: no such file",
    "--tasks qa_1 --lengths 4Ki": "--squad-file=None: is needed for qa_1",
    "--tasks mtob_ek --mtob-folder . --mtob-book no": "--mtob-book=no: is neither a book of MTOB nor a file",
    "--tasks needle --lengths 4Ki --leave-out-longer": "--leave-out-longer=true: says nothing without a length",
    "--tasks needle --lengths 4Ki --assistant \udcff{}": r"--assistant='\\udcff{}': is not UTF-8 text",
    "--lengths 4Ki": "the following arguments are required: --tasks",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_one_line_before_the_checkpoint_is_read(
    options: str, run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "open_checkpoint", lambda *args: pytest.fail("the checkpoint was read"))
    try:
        code = main([str(run), *options.split()])
    except SystemExit as end:  # argparse's own
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=WRONG[options]):
        raise ValueError(err)


def test_what_the_checkpoint_tells_is_refused_before_its_weights_are_read(
    run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "load_weights", lambda *args: pytest.fail("the weights were read"))
    (tmp_path / "bad.jsonl").write_text('{"question": "n"}\n')
    for options, told in (
        (["--tasks", "vt", "--lengths", "64"], "tokens at least with this tokenizer"),
        (["--tasks", "choices", "--choices-file", str(tmp_path / "bad.jsonl")], "line 1 has no list"),
        (["--tasks", "needle", "--lengths", "4Ki", "--corpus", str(tmp_path / "gone")], "gone"),
    ):
        assert main([str(run), *options, "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1
    assert main([str(tmp_path / "no-run"), "--tasks", "vt", "--lengths", "4Ki"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(
    run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmtrain.infer.engine.Engine.step", interrupt)
    args = [str(run), "--tasks", "needle", "--lengths", "3Ki", "--device", "cpu", "--quiet"]
    assert main(args) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "stopped: the same command goes on where it was\n"
