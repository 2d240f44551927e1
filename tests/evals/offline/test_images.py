"""Questions on images: who reads the file's answers gets all, who draws gets chance, damaged files are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mmdata.draw.write import DrawOptions, draw
from mmdata.tokenizer import FileTokenizer, load_tokenizer
from mmtrain.errors import ConfigError
from mmtrain.evals.files.image_questions import read_image_questions
from mmtrain.evals.offline.request import EvalRequest
from mmtrain.evals.offline.run import SampleLog, longest_of, run_units
from mmtrain.evals.offline.summary import summarise
from mmtrain.evals.offline.table import headline, tables
from mmtrain.evals.offline.units import list_units
from mmtrain.evals.ruler.prompt import Kit
from mmtrain.vision.prompt_images import PromptImages
from mmtrain.vision.prompts import ImagePrompts
from tests.evals.answerers import Score
from tests.infer.chain import file_tokenizer
from tests.vision.small import small_vl_config

IMAGE = 257
CHOICES = 4


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn questions, of which every other one has choices."""
    folder = tmp_path_factory.mktemp("drawn")
    draw(DrawOptions(folder, images=30, tile=28))
    records = [json.loads(line) for line in (folder / "train_questions.jsonl").read_text().splitlines()]
    for number, record in enumerate(records):
        if number % 2:
            others = [f"wrong {i}" for i in range(CHOICES - 1)]
            record["choices"] = [*others[: number % CHOICES], record["answer"], *others[number % CHOICES :]]
    (folder / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    """Bytes, and a token for images."""
    return load_tokenizer(file_tokenizer(tmp_path_factory.mktemp("tokenizer"), words=4))


class Reader:
    """Answers what the file says: it knows questions by prompts and pixels, so that neither may be another's."""

    def __init__(self, path: Path, request: EvalRequest, tokenizer: FileTokenizer, prompts: ImagePrompts) -> None:
        self.tokenizer, self.known, self.images = tokenizer, {}, 0
        for question in read_image_questions(path, "x"):
            if request.choices_by == "text" or not question.choices:
                seen = prompts.prompt(question.question, question.images, "x", path.parent, turn=True)
                self.known[seen.tokens, seen.images().digests] = question

    def generate(
        self, rows: Sequence[np.ndarray], most: Sequence[int], images: Sequence[PromptImages]
    ) -> list[list[int]]:
        self.images += len(images)
        found = [self.known[tuple(row.tolist()), shown.digests] for row, shown in zip(rows, images, strict=True)]
        return [self.tokenizer.encode(f"{one.answers[0].upper()}.\nUser: and") for one in found]

    def score(self, rows: Sequence[np.ndarray], starts: Sequence[int], images: Sequence[PromptImages]) -> list[Score]:
        scores = []
        for row, start, shown in zip(rows, starts, images, strict=True):
            question = self.known[tuple(row[:start].tolist()), shown.digests]
            said = self.tokenizer.decode(row[start:].tolist())
            scores.append(
                Score(np.full(len(row) - start, -1.0 if said.lstrip() == question.answers[0] else -9.0), np.ones(0))
            )
        return scores


class Drawer:
    """Draws answers and log-probabilities."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def generate(
        self, rows: Sequence[np.ndarray], most: Sequence[int], images: Sequence[PromptImages]
    ) -> list[list[int]]:
        return [self.rng.integers(97, 123, one).tolist() for one in most]

    def score(self, rows: Sequence[np.ndarray], starts: Sequence[int], images: Sequence[PromptImages]) -> list[Score]:
        return [Score(-self.rng.exponential(9, 1).astype(np.float32), np.ones(0)) for _ in rows]


def evaluated(drawn: Path, tokenizer: FileTokenizer, answerer: type, folder: Path, by: str = "text") -> dict:
    request = EvalRequest(("images",), files=(("images", drawn / "all.jsonl"),), choices_by=by, answer_tokens=4)
    request.validate()
    prompts = ImagePrompts(tokenizer, small_vl_config(dict(image_token=IMAGE), vocab_size=300))
    units = list_units(request, Kit(tokenizer, None), prompts)
    assert longest_of(units, request) > 16
    asked = answerer(drawn / "all.jsonl", request, tokenizer, prompts) if answerer is Reader else answerer()
    log = SampleLog(folder / "samples.jsonl")
    records = run_units(units, asked, request, log, 8, lambda record: None)
    again = run_units(units, None, request, SampleLog(folder / "samples.jsonl"), 8, lambda record: None)
    assert again == json.loads(json.dumps(records))
    return summarise(records)


def test_who_reads_gets_all(drawn: Path, tokenizer: FileTokenizer, tmp_path: Path) -> None:
    summary = evaluated(drawn, tokenizer, Reader, tmp_path)
    told = summary["files"]["images"]
    assert told["accuracy"] == told["exact"] == told["chosen"] == 100 and told["chance"] == 100 / CHOICES
    assert 75 < told["anls"] < 100  # the full stop that exact match takes away counts here
    assert len(told["kinds"]) > 3 and all(part["accuracy"] == 100 for part in told["kinds"].values())
    assert headline(summary) == "images 100.0%"
    table = tables(summary)
    assert all(kind in table for kind in told["kinds"]) and "anls" in table


@pytest.mark.parametrize("by", ["text", "letter"])
def test_who_draws_gets_chance(drawn: Path, tokenizer: FileTokenizer, tmp_path: Path, by: str) -> None:
    told = evaluated(drawn, tokenizer, Drawer, tmp_path, by)["files"]["images"]
    assert told["exact"] < 3
    off = 100 * (0.25 * 0.75 / told["with_choices"]) ** 0.5
    assert abs(told["chosen"] - 25) < 4 * off


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": None}, 'has no "image"'),
        ({"image": "gone.png"}, "no such file"),
        ({"question": " "}, 'has no text "question"'),
        ({"answer": None}, 'has no "answer"'),
        ({"answers": []}, 'has no "answer"'),
        ({"kind": 3}, '"kind" that is no text'),
        ({"choices": ["a"]}, 'no list "choices"'),
        ({"choices": ["a", "b"], "answer": "c"}, 'no list "choices"'),
    ],
)
def test_damaged_lines_are_named(drawn: Path, change: dict, words: str) -> None:
    record = json.loads((drawn / "all.jsonl").read_text().splitlines()[0])
    path = drawn / "damaged.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n" + json.dumps(record | change) + "\n")
    with pytest.raises(ConfigError) as caught:
        read_image_questions(path, "--images")
    assert words in str(caught.value) and "line 3" in str(caught.value) and "\n" not in str(caught.value)


def test_several_right_answers_and_images(drawn: Path) -> None:
    record = json.loads((drawn / "all.jsonl").read_text().splitlines()[0])
    path = drawn / "several.jsonl"
    images = [record["image"]] * 2
    path.write_text(json.dumps({"question": "<image> or <image>?", "images": images, "answers": ["a", 2]}) + "\n")
    (found,) = read_image_questions(path, "--images")
    assert found.answers == ("a", "2") and found.images == tuple(images) and found.kind == "other"
