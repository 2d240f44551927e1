"""Questions asked of a model with eyes: prompts as in training, greedy answers in packed rows, scores, the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmdata.errors import DataError
from mmdata.tokenizer import Tokenizer, load_tokenizer
from mmtrain.build import build_model
from mmtrain.errors import ConfigError
from mmtrain.runs.ask import questions as asking
from mmtrain.runs.ask.answers import KindScore, greedy_answers, score
from mmtrain.runs.ask.ask import AskRequest, ask, check_counts
from mmtrain.runs.ask.page import answers_page
from mmtrain.runs.ask.questions import ImageQuestion, read_questions
from mmtrain.runs.ask.scores import answer_lines
from mmtrain.vision.model import VisionLanguageModel
from tests.data.images.made import SMALL, prepared, write_images, write_records
from tests.model.small import small_config
from tests.vision.small import small_vl_model

RECORDS = [
    {"image": f"images/{i}.png", "question": f"what is {i}?", "answer": "ab"[i % 2], "kind": ("one", "two")[i > 3]}
    for i in range(6)
]


def made_of(folder: Path, records: list[dict]) -> tuple[Path, Tokenizer]:
    """A file of records about six pictures, and the tokenizer of a corpus of them."""
    write_images(folder / "images", [(16 + 9 * i, 30) for i in range(6)])
    file = write_records(folder, records)
    prepared(file, folder / "corpus")
    return file, load_tokenizer(folder / "corpus")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    return made_of(tmp_path_factory.mktemp("ask"), RECORDS)


def test_a_prompt_is_what_training_has_before_the_answer(made: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    file, tokenizer = made
    corpus = prepared(file, tmp_path / "c", tokenizer=str(file.parent / "corpus"))
    for i, question in enumerate(read_questions(file, tokenizer, SMALL, corpus.image_id)):
        begin = corpus.doc_offsets[i]
        assert np.array_equal(corpus.data[begin : begin + len(question.prompt)], question.prompt)
        assert tokenizer.decode(question.prompt[question.layouts[0].tokens :].tolist()).endswith("Assistant:")
        assert corpus.is_label(np.array([begin + len(question.prompt)]))[0]
        assert len(question.tiles(SMALL)) == question.layouts[0].tiles


def test_some_are_spread_over_the_file_and_bad_files_refused(made: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    file, tokenizer = made
    some = [question.question for question in read_questions(file, tokenizer, SMALL, 1, 3)]
    assert some == ["what is 0?", "what is 2?", "what is 4?"]
    with pytest.raises(DataError, match="is no question: it needs question and answer"):
        read_questions(write_records(tmp_path, [{"caption": "x"}]), tokenizer, SMALL, 1)
    with pytest.raises(DataError, match="is not there"):
        read_questions(tmp_path / "none.jsonl", tokenizer, SMALL, 1)


def test_answers_do_not_depend_on_what_shares_the_row(
    made: tuple[Path, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tokenizer = made
    questions = read_questions(file, tokenizer, SMALL, 1)
    model = small_model(tokenizer)
    together = greedy_answers(model, tokenizer, SMALL, questions, 1, most_tokens=4)
    monkeypatch.setattr(asking, "ROW_TOKENS", 1)
    alone = greedy_answers(model, tokenizer, SMALL, questions, 1, most_tokens=4)
    assert together == alone and len(together) == 6 and len(set(together)) > 1


def test_scores_are_by_kind_beside_the_commonest_answer() -> None:
    def of(kind: str, answer: str) -> ImageQuestion:
        return ImageQuestion("?", answer, kind, (), np.zeros(0, np.int32), ())

    asked = [of("n", "1"), of("n", "1"), of("n", "2"), of("c", "red")]
    assert score(asked, ["1", "2", "2", "blue"]) == [KindScore("c", 0, 1, 1), KindScore("n", 2, 3, 2)]


def test_the_page_shows_pictures_of_every_kind_and_is_escaped(made: tuple[Path, Tokenizer]) -> None:
    file, tokenizer = made
    questions = read_questions(file, tokenizer, SMALL, 1)
    given = ["a", "<b>", *["a"] * 4]
    page = answers_page("a & b", answer_lines(score(questions, given)), [], questions, given, 4)
    assert page.count("data:image/png;base64,") == 4 and "what is 4?" in page and "what is 5?" in page
    assert "a &amp; b" in page and "&lt;b&gt; (right: b)" in page and "<b>" not in page
    assert "http" not in page


def test_a_model_is_asked_and_what_cannot_be_is_refused(made: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    file, tokenizer = made
    model, page = small_model(tokenizer), tmp_path / "page.html"
    lines = list(ask(model, tokenizer, AskRequest("m", file, page, limit=4, pictures=2)))
    assert lines[0].startswith("one ") and lines[1].startswith("two ") and lines[2].endswith(f"answers: {page}")
    assert page.read_text().count("data:image") == 2
    with pytest.raises(ConfigError, match="has no eyes"):
        list(ask(build_model(small_config()), tokenizer, AskRequest("m", file, page)))
    with pytest.raises(ConfigError, match=r"--page=.* cannot be written"):
        list(ask(model, tokenizer, AskRequest("m", file, tmp_path / "no/page.html", limit=1)))
    with pytest.raises(ConfigError, match="--limit=0: must be at least 1"):
        check_counts(0, 2)


def small_model(tokenizer: Tokenizer) -> VisionLanguageModel:
    """A model with SMALL's tiles that answers differently to different images."""
    grids = [list(grid) for grid in SMALL.grids]
    eyes = {"image_token": 1, "tile_size": SMALL.tile, "patch_size": SMALL.patch, "grids": grids}
    model = small_vl_model(eyes, vocab_size=tokenizer.vocab_size).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("layers.") and "norm" not in name:
                parameter.mul_(4)  # what stands before a token counts for more than the token
    return model
