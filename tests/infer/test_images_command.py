"""`launch/generate.py`, `launch/eval.py` and `launch/convert.py` with a model with eyes."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdata.images.corpus import ImageFormat
from mmtrain.infer.load import load_for_decoding
from mmtrain.vision.prompts import ImagePrompts, template_of_run
from tests.infer.seeing_run import TEMPLATE, SeeingRun, make_seeing_run
from tests.infer.seen import whole_logits

ROOT = Path(__file__).resolve().parents[2]
Main = Callable[[list[str]], int]
Capture = pytest.CaptureFixture[str]
GREEDY = ["--greedy", "--tokens", "4", "--ignore-eod", "--device", "cpu"]


def main_of(name: str) -> Main:
    """The main function of a launcher."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SeeingRun:
    """The run."""
    return make_seeing_run(tmp_path_factory.mktemp("seeing"))


def questions(made: SeeingRun) -> list[dict]:
    """Records of the data set's questions."""
    lines = (made.drawn / "train_questions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_question_is_asked_with_the_tokens_of_the_corpus(made: SeeingRun) -> None:
    """The first question of a conversation, as prepared, is what a model is asked."""
    _, tokenizer = load_for_decoding(made.run, device="cpu")
    prompts = ImagePrompts(tokenizer, made.model, TEMPLATE)
    corpus = ImageFormat().train(str(made.corpus))
    conversation = json.loads((made.drawn / "train_conversations.jsonl").read_text().splitlines()[0])
    text, answer = (turn["value"] for turn in conversation["conversations"][:2])
    seen = prompts.prompt(text, [conversation["image"]], "x", made.drawn, turn=True)
    row = [*seen.tokens, *tokenizer.encode(TEMPLATE.spaces + answer)]
    starts = [int(start) for start in corpus.doc_offsets]
    assert any(np.array_equal(corpus.data[start : start + len(row)], row) for start in starts)
    images = seen.images()
    assert images is not None and images.at_I.tolist() == [
        place for place, token in enumerate(seen.tokens) if token == corpus.image_id
    ]


def test_turns_are_those_of_the_runs_corpus(made: SeeingRun) -> None:
    meta = json.loads(next((made.run / "checkpoints").glob("*/meta.json")).read_text())
    assert template_of_run(meta) == TEMPLATE and template_of_run({}) is None


def test_an_image_is_continued_as_whole_passes_say(made: SeeingRun, capsys: Capture, tmp_path: Path) -> None:
    model, tokenizer = load_for_decoding(made.run, device="cpu")
    record = questions(made)[0]
    image = str(made.drawn / record["image"])
    seen = ImagePrompts(tokenizer, made.model, TEMPLATE).prompt(record["question"], [image], "x", turn=True)
    images = seen.images()
    assert images is not None
    prompt = np.array(seen.tokens)
    row = list(seen.tokens)
    shown = pytest.MonkeyPatch()
    shown.setattr("tests.infer.seen.IMAGE", made.model.vision.image_token)
    for _ in range(4):
        logits = whole_logits(model, tuple(row), images)[-1]
        logits[tokenizer.eod_id] = -float("inf")
        row.append(int(logits[: tokenizer.vocab_size].argmax()))
    shown.undo()
    wanted = tokenizer.decode(row[len(prompt) :])
    main = main_of("generate")
    asked = ["--image", image, "--prompt", record["question"], "--chat", "--no-echo", "--quiet", *GREEDY]
    assert main([str(made.run), *asked, "--stop", "never said"]) == 0
    assert capsys.readouterr().out == wanted + "\n"
    lines = [{"prompt": record["question"], "images": [record["image"]]}] * 2 + [{"prompt": "<image> so", "images": [
        record["image"]]}]  # fmt: skip
    file = made.drawn / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "folder"
    assert main_of("convert")([str(made.run), str(folder), "--to", "minimax", "--dtype", "float32", "--quiet"]) == 0
    capsys.readouterr()
    turns = ["--user", TEMPLATE.user, "--assistant", TEMPLATE.assistant, "--stop", "never said"]
    assert main([str(folder), "--prompts", str(file), "--chat", "--quiet", *turns, *GREEDY]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in told[:2]] == [wanted] * 2
    assert told[0]["prompt_tokens"] == len(prompt) and told[2]["prompt_tokens"] != len(prompt)


WRONG = {
    "no such image": (["--image", "gone.png", "--prompt", "x"], "--image=gone.png: no such file"),
    "no image": (["--image", "BROKEN", "--prompt", "x"], "not an image"),
    "placeholder": (["--image", "IMAGE", "--prompt", "<image> <image>"], "2 placeholders and 1 images"),
    "too many": (["--image", "IMAGE", "--image", "IMAGE", "--prompt", "<image>"], "1 placeholders and 2 images"),
    "none": (["--prompt", "<image> so"], "1 placeholders and 0 images"),
    "none in a file": (["--prompts", "NONE"], "1 placeholders and 0 images"),
    "turns": (["--image", "IMAGE", "--prompt", "x", "--user", "U"], "--user=U: has no effect without --chat"),
    "turn": (["--image", "IMAGE", "--prompt", "x", "--user", "U", "--chat"], "--user='U': needs {} once"),
    "interactive": (["--image", "IMAGE", "--interactive"], "has no effect with --interactive"),
    "ids": (["--prompts", "TOKENS"], "has images beside tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_a_line(case: str, made: SeeingRun, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (tmp_path / "tokens.jsonl").write_text('{"tokens": [1], "images": ["a.png"]}\n')
    (tmp_path / "none.jsonl").write_text('{"prompt": "what is <image>"}\n')
    places = {"IMAGE": str(made.drawn / questions(made)[0]["image"])}
    places |= {name.upper(): str(path) for name, path in ((path.stem, path) for path in tmp_path.iterdir())}
    arguments, words = WRONG[case]
    assert main_of("generate")([str(made.run), *(places.get(one, one) for one in arguments), *GREEDY]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_a_line_with_a_placeholder_is_told_and_the_next_one_continued(
    made: SeeingRun, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is <image>\nso\n"))
    assert main_of("generate")([str(made.run), "--interactive", *GREEDY]) == 0
    error = capsys.readouterr().err
    assert "error: --interactive=" in error and "1 placeholders and 0 images" in error and "1 continuations" in error


def test_a_model_without_eyes_takes_no_image(made: SeeingRun, capsys: Capture, tmp_path: Path) -> None:
    from tests.infer.chain import chain_model, save_run

    save_run(tmp_path / "run", chain_model())
    image = str(made.drawn / questions(made)[0]["image"])
    assert main_of("generate")([str(tmp_path / "run"), "--image", image, "--prompt", "x", *GREEDY]) == 2
    assert "the model has no eyes" in capsys.readouterr().err
    assert main_of("generate")([str(tmp_path / "run"), "--prompt", "<image>", *GREEDY]) == 0  # letters, to a text model


def test_questions_are_evaluated_into_a_table_by_kind(made: SeeingRun, capsys: Capture, tmp_path: Path) -> None:
    file = made.drawn / "some.jsonl"
    records = questions(made)[:6]
    chosen = {**records[0], "choices": [records[0]["answer"], "something else"], "kind": "chosen"}
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, chosen]))
    asked = ["--tasks", "images", "--images", str(file), "--answer-tokens", "3", "--device", "cpu"]
    assert main_of("eval")([str(made.run), *asked, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    told = result["files"]["images"]
    assert told["questions"] == 7 and told["free"] == 6 and told["with_choices"] == 1 and told["chance"] == 50
    assert set(told["kinds"]) == {"chosen", *(record["kind"] for record in records)}
    assert result["turns"]["user"] == TEMPLATE.user and result["request"]["answer_tokens"] == 3
    assert "accuracy" in out and out.splitlines()[-1].startswith("images ")
    again = capsys.readouterr
    assert main_of("eval")([str(made.run), *asked, "--out", str(tmp_path), "--choices-by", "letter"]) == 0
    assert len(list(tmp_path.glob("*.json"))) == 2 and "images " in again().out
