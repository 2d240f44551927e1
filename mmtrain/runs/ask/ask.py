"""Ask a model about images: answer, score, and write the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.model.model import HybridLM
from mmtrain.runs.ask.answers import greedy_answers, score
from mmtrain.runs.ask.page import answers_page
from mmtrain.runs.ask.questions import read_questions
from mmtrain.vision.images import tile_rules
from mmtrain.vision.model import VisionLanguageModel


def check_counts(limit: int | None, pictures: int) -> None:
    """Refuse numbers of questions and pictures that cannot be.

    Raises:
        ConfigError: one of them is below 1.
    """
    for option, value in (("--limit", limit), ("--pictures", pictures)):
        if value is not None and value < 1:
            raise ConfigError(option, value, "must be at least 1", "for example 60")


def ask(
    model: HybridLM, tokenizer: Tokenizer, title: str, file: Path, page: Path, limit: int | None, pictures: int
) -> Iterator[str]:
    """Yield a line on each kind of question and one on the page, which is written then.

    Args:
        model: whole, on one device, in evaluation mode.
        tokenizer: that it was trained with.
        title: of the page.
        file: .jsonl of questions.
        page: file of the page.
        limit: how many to ask, spread over the file; None asks all.
        pictures: on the page.

    Raises:
        ConfigError: the model has no eyes, or the page cannot be written.
        DataError: as `read_questions` does.
    """
    vision = model.config.vision
    if vision is None or not isinstance(model, VisionLanguageModel):
        raise ConfigError("run", title, f"its model {model.config.name} has no eyes", "give a run of a model that sees")
    rules = tile_rules(vision)
    questions = read_questions(file, tokenizer, rules, vision.image_token, limit)
    answers = greedy_answers(model, tokenizer, rules, questions, vision.image_token)
    scores = score(questions, answers)
    for one in scores:
        yield (f"{one.kind:<10} {one.accuracy:6.1%} of {one.asked:,} right "
               f"(the commonest answer: {one.blind / one.asked:.1%})")  # fmt: skip
    try:
        page.write_text(answers_page(f"{title}: answers", scores, questions, answers, pictures), encoding="utf-8")
    except OSError as error:
        raise ConfigError("--page", page, f"cannot be written ({error.strerror})", "give another file") from error
    yield f"{min(pictures, len(questions))} pictures with answers: {page}"
