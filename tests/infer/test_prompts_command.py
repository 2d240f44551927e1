"""`launch/generate.py` with a file of prompts, and line by line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtrain.infer import load
from tests.infer.chain import TEXT

Main = Callable[[list[str]], int]
Capture = pytest.CaptureFixture[str]


def prompts(folder: Path, *lines: object) -> str:
    path = folder / "prompts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def test_a_line_comes_out_for_each_prompt_in_order(run: Path, main: Main, capsys: Capture, tmp_path: Path) -> None:
    file = prompts(
        tmp_path,
        {"prompt": "n", "id": "first"},
        "",
        {"prompt": "né", "max_tokens": 3, "prompt_logprobs": True, "logprobs": True},
        {"tokens": [ord("n")], "stop": "😀", "temperature": 1},
        {"prompt": "né€😀", "ignore_eod": True, "max_tokens": 5, "stop_ids": [ord("é".encode()[:1])]},
    )
    out = tmp_path / "made.jsonl"
    assert main([str(run), "--prompts", file, "--greedy", "--out", str(out), "--max-running", "2"]) == 0
    assert "4 prompts in" in capsys.readouterr().err
    made = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in made] == ["first", 3, 4, 5]
    assert [line["text"] for line in made[:3]] == [TEXT[1:], "€", "é€"]
    assert [line["finish"] for line in made] == ["eod", "length", "stop", "length"]
    assert [line["prompt_tokens"] for line in made] == [1, 3, 1, 10]
    assert made[1]["tokens"] == list("€".encode())
    assert len(made[1]["logprobs"]) == 3 and len(made[1]["prompt_logprobs"]) == 2
    assert all(-5 < x < 0 for x in [*made[1]["logprobs"], *made[1]["prompt_logprobs"]])
    assert "logprobs" not in made[0]
    assert main([str(run), "--prompts", file, "--greedy", "--quiet"]) == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")


def test_texts_may_hold_other_ends_of_lines(run: Path, main: Main, capsys: Capture, tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x1cn"
    file = Path(prompts(tmp_path, {"prompt": text}))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Windows begins a file
    assert main([str(run), "--prompts", str(file), "--greedy", "--quiet"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["prompt_tokens"], made["text"]) == (len(text.encode()), TEXT[1:])


def test_lines_are_json_whatever_the_output_takes(run: Path, main: Main, tmp_path: Path) -> None:
    file, out = prompts(tmp_path, {"prompt": "n"}), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
        assert main([str(run), "--prompts", file, "--greedy", "--quiet"]) == 0
        sys.stdout.flush()
        assert json.loads(out.getvalue())["text"] == TEXT[1:]


def test_seeds_count_up_with_the_lines_and_may_be_given(run: Path, main: Main, capsys: Capture, tmp_path: Path) -> None:
    file = prompts(tmp_path, {"prompt": "n"}, {"prompt": "n"}, {"prompt": "n", "seed": 5}, {"prompt": "n", "top_k": 1})
    arguments = ["--prompts", file, "--temperature", "20", "--seed", "5", "--ignore-eod", "--tokens", "8", "--quiet"]
    assert main([str(run), *arguments]) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts[0] == texts[2] != texts[1] and texts[3].startswith(TEXT[1:3])


WRONG = {
    "": "has no prompt",
    "{": "line 1: is no JSON",
    "[1]": "needs either prompt or tokens",
    '{"prompt": "a"}\n{}': "line 2: needs either prompt or tokens",
    '{"prompt": "a", "tokens": [1]}': "needs either",
    '{"prompt": "a", "temprature": 1}': "unknown field 'temprature'; did you mean 'temperature'?",
    '{"prompt": 3}': "prompt must be str; it is 3",
    '{"prompt": "a", "max_tokens": true}': "max_tokens must be int; it is true",
    '{"prompt": "a", "top_p": "x"}': "top_p must be int or float or null",
    '{"tokens": [1, "b"]}': 'tokens must hold ints; not "b"',
    '{"tokens": [300]}': "line 1, tokens 300: is no id",
    '{"prompt": "a"}\n{"prompt": "a", "temperature": -1}': "line 2, --temperature -1: must be",
    '{"prompt": "a", "max_tokens": 0}': "line 1, max_tokens 0: must be at least 1",
    r'{"prompt": "a\ud800"}': r"line 1: is no JSON (\ud800 is half of a character)",
    r'{"prompt": "a", "id": "\udc00"}': r"is no JSON (\udc00 is half of a character)",
    f'{{"prompt": "a", "seed": {"9" * 5000}}}': "is no JSON (a number has too many digits)",
    "[" * 100_000: "is no JSON (nested too deeply)",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_lines_are_refused_before_the_weights_are_read(
    text: str, run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "load_weights", lambda *args: pytest.fail("the weights were read"))
    assert main([str(run), "--prompts", prompts(tmp_path, text)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and WRONG[text] in err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--prompts gone.jsonl", "--prompts=gone.jsonl: cannot be read"),
        ("--prompts gone.jsonl --samples 2", "--samples=2: has no effect with --prompts"),
        ("--prompt n --out x", "--out=x: has no effect without --prompts"),
        ("--prompt n --max-running 2", "--max-running=2: has no effect without --prompts"),
        ("--prompts gone.jsonl --max-running 0", "--max-running=0: must be at least 1"),
        ("--prompt n --prefill-tokens 0", "--prefill-tokens=0: must be at least 1"),
        ("--prompt n --memory-gib 0", "--memory-gib=0.0: must be a number above 0"),
        ("--prompt n --memory-gib nan", "--memory-gib=nan: must be"),
        ("--prompts gone.jsonl --out gone/x", "--out=gone/x: its folder does not exist"),
        ("--prompt n --repetition-penalty 0", "--repetition-penalty=0.0: must be"),
        ("--prompt n --stop=", "--stop='': is found everywhere"),
        ("--prompt n --memory-gib 0.000001", "engine.memory_bytes=0.0 MiB: one takes"),
    ],
)
def test_wrong_options_are_one_line(options: str, told: str, run: Path, main: Main, capsys: Capture) -> None:
    assert main([str(run), *options.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and told in err


def test_a_file_that_is_there_stays(run: Path, main: Main, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "made").write_text("mine")
    assert main([str(run), "--prompts", prompts(tmp_path, {"prompt": "n"}), "--out", str(tmp_path / "made")]) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "made").read_text() == "mine"


def test_a_prompt_beyond_the_memory_is_named_before_any_is_written(
    run: Path, main: Main, capsys: Capture, tmp_path: Path
) -> None:
    file = prompts(tmp_path, {"prompt": "n"}, {"prompt": "n", "max_tokens": 10**7})
    assert main([str(run), "--prompts", file, "--memory-gib", "0.001"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--prompts=line 2, tokens 10,000,001 tokens" in err and "the cache holds" in err


def test_lines_are_continued_as_they_come(
    run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n\nné€\n"))
    assert main([str(run), "--interactive", "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{TEXT[1:]}\n{TEXT[3:]}\n" and "2 continuations" in err


def test_a_line_that_is_no_utf_8_is_told_and_the_next_one_continued(
    run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\nn\n"), encoding="utf-8"))
    assert main([str(run), "--interactive", "--greedy", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{TEXT[1:]}\n" and err.count("\n") == 1 and "is not UTF-8 text" in err


def test_a_stop_and_half_precision(run: Path, main: Main, capsys: Capture) -> None:
    arguments = ["--prompt", "n", "--greedy", "--quiet", "--precision", "bf16", "--stop", "x", "--stop", "😀"]
    assert main([str(run), *arguments]) == 0
    assert capsys.readouterr().out == "né€\n"
