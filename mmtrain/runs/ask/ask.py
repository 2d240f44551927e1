"""Ask a model about images: answer, score, and write the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.model.model import HybridLM
from mmtrain.runs.ask.answers import greedy_answers, score
from mmtrain.runs.ask.page import answers_page
from mmtrain.runs.ask.pairs import log_prob_margins, preference_scores, read_pairs
from mmtrain.runs.ask.questions import read_questions
from mmtrain.runs.ask.scores import ScoreLine, answer_lines, preference_lines
from mmtrain.vision.images import tile_rules
from mmtrain.vision.model import VisionLanguageModel


@dataclass(frozen=True)
class AskRequest:
    """What is asked, and where the page goes.

    Attributes:
        title: of the page.
        questions: .jsonl of questions.
        page: file of the page.
        pairs: .jsonl of pairs of answers, of which the model is to prefer one; None asks for no preference.
        limit: how many questions to ask, and how many pairs, spread over their file; None takes all.
        pictures: on the page.
    """

    title: str
    questions: Path
    page: Path
    pairs: Path | None = None
    limit: int | None = None
    pictures: int = 60


def check_counts(limit: int | None, pictures: int) -> None:
    """Refuse numbers of questions and pictures that cannot be.

    Raises:
        ConfigError: one of them is below 1.
    """
    for option, value in (("--limit", limit), ("--pictures", pictures)):
        if value is not None and value < 1:
            raise ConfigError(option, value, "must be at least 1", "for example 60")


def ask(model: HybridLM, tokenizer: Tokenizer, request: AskRequest, before: HybridLM | None = None) -> Iterator[str]:
    """Yield a line on each kind of question, one on each kind of pair, and one on the page, which is written then.

    Args:
        model: whole, on one device, in evaluation mode.
        tokenizer: that it was trained with.
        request: what is asked.
        before: an earlier model of the same eyes and tokenizer, whose figures stand beside.

    Raises:
        ConfigError: a model has no eyes or other ones than the other, or the page cannot be written.
        DataError: as `read_questions` and `read_pairs` do.
    """
    seers = [_seeing(model, "run", request.title), *([] if before is None else [_seeing(before, "--before", "RUN")])]
    vision = seers[0].config.vision
    assert vision is not None
    rules, token = tile_rules(vision), vision.image_token
    if before is not None and (before.config.vision != vision or before.config.vocab_size != model.config.vocab_size):
        raise ConfigError("--before", before.config.name, f"has not the eyes and vocabulary of {model.config.name}",
                          "give an earlier run of the same model")  # fmt: skip
    questions = read_questions(request.questions, tokenizer, rules, token, request.limit)
    pairs = [] if request.pairs is None else read_pairs(request.pairs, tokenizer, rules, token, request.limit)
    answers = [greedy_answers(one, tokenizer, rules, questions, token) for one in seers]
    margins = [log_prob_margins(one, rules, pairs, token) for one in seers]
    right = answer_lines(*(score(questions, given) for given in answers))
    preferred = preference_lines(*(preference_scores(pairs, found) for found in margins))
    yield from (told(line, "right") for line in right)
    yield from (told(line, "of pairs prefer the right answer") for line in preferred)
    page = answers_page(f"{request.title}: answers", right, preferred, questions, answers[0], request.pictures)
    try:
        request.page.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "--page", request.page, f"cannot be written ({error.strerror})", "give another file"
        ) from error
    yield f"{min(request.pictures, len(questions))} pictures with answers: {request.page}"


def _seeing(model: HybridLM, option: str, value: str) -> VisionLanguageModel:
    if model.config.vision is None or not isinstance(model, VisionLanguageModel):
        raise ConfigError(
            option, value, f"its model {model.config.name} has no eyes", "give a run of a model that sees"
        )
    return model


def told(line: ScoreLine, what: str) -> str:
    """Return a line of a table of figures as text; `what` says of what it is a share."""
    before = "" if line.before is None else f", before: {line.before:.1%}"
    return f"{line.kind:<10} {line.share:6.1%} of {line.asked:,} {what} ({line.by_chance}: {line.chance:.1%}{before})"
