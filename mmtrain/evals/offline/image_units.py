"""Units of questions on images: the prompt as the training data write it, and how the answer is judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.tokenizer import Tokenizer
from mmtrain.evals.answering import RowScore
from mmtrain.evals.files.answers import anls, exact_match
from mmtrain.evals.files.choices import score_choices
from mmtrain.evals.files.image_questions import ImageQuestion, read_image_questions
from mmtrain.evals.files.read_choices import LETTERS
from mmtrain.evals.offline.request import FILE_OPTIONS, IMAGES, EvalRequest
from mmtrain.evals.offline.work import Figures, Work, digest_of
from mmtrain.vision.prompts import ImagePrompts, SeenPrompt


def image_works(request: EvalRequest, tokenizer: Tokenizer, prompts: ImagePrompts) -> Iterator[Callable[[], Work]]:
    """Yield what makes the sample of each question of the file; images are looked at when one is made.

    Raises:
        ConfigError: the file is damaged.
    """
    path, option = dict(request.files)[IMAGES], FILE_OPTIONS[IMAGES]
    for question in read_image_questions(path, option):
        make = _choice if question.choices else _free
        yield partial(make, request, tokenizer, prompts, path.parent, question)


def _free(
    request: EvalRequest, tokenizer: Tokenizer, prompts: ImagePrompts, folder: Path, question: ImageQuestion
) -> Work:
    """A question that is answered in the model's own words."""
    seen = _asked(prompts, question, question.question, folder)

    def judge(ids: Sequence[int]) -> Figures:
        answer = prompts.answer_of(tokenizer.decode(list(ids)))
        exact = exact_match(answer, question.answers)
        return {"score": 100.0 * exact, "exact": exact, "anls": anls(answer, question.answers),
                "answer": answer[:500], "expected": list(question.answers)}  # fmt: skip

    row_T = np.array(seen.tokens, dtype=np.int64)
    return Work(_digest([row_T], seen, question.answers), [row_T], request.answer_tokens, judge,
                {"name": question.name, "kind": question.kind}, images=seen.images)  # fmt: skip


def _choice(
    request: EvalRequest, tokenizer: Tokenizer, prompts: ImagePrompts, folder: Path, question: ImageQuestion
) -> Work:
    """A question whose choices are scored: their texts after the question, or their letters after all of them."""
    text, choices = question.question, question.choices
    if request.choices_by == "letter":
        choices = tuple(LETTERS[: len(choices)])
        listed = (f"({letter}) {one.strip()}" for letter, one in zip(choices, question.choices, strict=True))
        text = "\n".join([text, *listed, "Answer with the letter."])
    seen = _asked(prompts, question, text, folder)
    rows = [
        np.array([*seen.tokens, *tokenizer.encode(prompts.template.spaces + choice.strip())], dtype=np.int64)
        for choice in choices
    ]

    def judge(scores: Sequence[RowScore]) -> Figures:
        log_probs_C = np.array([score.log_probs_N.sum(dtype=np.float64) for score in scores])
        return {"score": 100.0 * score_choices(log_probs_C, choices, question.right).acc}

    facts = {"name": question.name, "kind": question.kind, "chance": 100 / len(rows)}
    starts = (len(seen.tokens),) * len(rows)
    return Work(_digest(rows, seen, question.right), rows, 0, judge, facts, starts, seen.images)


def _asked(prompts: ImagePrompts, question: ImageQuestion, text: str, folder: Path) -> SeenPrompt:
    return prompts.prompt(text, question.images, FILE_OPTIONS[IMAGES], folder, turn=True)


def _digest(rows: Sequence[np.ndarray], seen: SeenPrompt, expected: Any) -> str:
    """Hash of rows, of what the images are known by, and of what is expected."""
    known = [known_by for _, known_by in seen.files]
    return hashlib.sha256(f"{digest_of(rows, expected)} {known}".encode()).hexdigest()
